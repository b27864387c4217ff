"""Comparisons, reports and plots."""
