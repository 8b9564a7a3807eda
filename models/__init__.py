"""Architectures, one file a family. Each is complete, and made to be read and copied; ``_template.py`` is the start."""
