"""State the version of the package, for what must not import the package's face."""

__version__ = "0.1.0"
