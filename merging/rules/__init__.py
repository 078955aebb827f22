"""Merge rules on ranges of weights: stitching, overlaps, TIES, consensus and matrix rules.

Merge methods, specialists, statistics and analyses import it.
"""
