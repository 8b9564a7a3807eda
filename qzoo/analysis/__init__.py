"""Study the quantizers and layers of a model."""
