"""Comparisons of masks and of merged models: overlaps, agreement and differences.

Reports, studies and audits import it through `tasks` and `flows`.
"""
