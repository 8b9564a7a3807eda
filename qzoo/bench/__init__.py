"""Measure accuracy and latency in every runtime."""
