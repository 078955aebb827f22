"""Comparisons of merge methods, analyses of masks, specialists and studies.

The command line imports it; export and repair read specialists through it.
"""
