"""Recurrent cells, and training through time."""
