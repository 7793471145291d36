"""Corpus metrics with signatures and intervals, rank correlations, and diagnostics of decay."""
