"""Write model cards from a checkpoint's config."""
