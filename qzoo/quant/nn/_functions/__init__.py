"""Functional parts of the quantized modules."""
