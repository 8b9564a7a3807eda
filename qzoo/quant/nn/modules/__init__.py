"""The quantized modules, one file a kind."""
