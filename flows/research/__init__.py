"""Comparisons of merge methods, analyses of masks, specialists, and the studies of the papers.

The command line imports it; export and repair read specialists through it.
"""
