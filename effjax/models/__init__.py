"""Backbones and weight conversion."""
