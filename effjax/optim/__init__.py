"""Optimizers and update rules."""
