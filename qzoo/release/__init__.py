"""Publish checkpoints, verify what is published, and write the tables of the zoo."""
