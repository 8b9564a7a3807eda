"""A zoo of pre-quantized vision models."""

__version__ = "0.1.0"
