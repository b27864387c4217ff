"""Fewer tokens and smaller elements for transformers."""
