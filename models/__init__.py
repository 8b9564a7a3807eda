"""Architectures, one file a family, each complete and made to be copied; ``_template.py`` is the start."""
