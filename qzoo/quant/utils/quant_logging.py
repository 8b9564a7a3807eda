"""Logging helper of the old toolkit, kept for scripts that call it."""

from __future__ import annotations

import logging


def reset_logger_handler() -> None:
    """Remove every handler from the root logger. qzoo itself never touches the root logger."""
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
