"""What masks and merged models have in common: overlaps, agreement and differences.

Reports, studies and audits import it through `tasks` and `flows`.
"""
