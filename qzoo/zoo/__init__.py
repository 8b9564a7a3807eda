"""From a name to a model, and back to disk."""
