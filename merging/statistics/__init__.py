"""Statistics that a merge method needs of a member in addition to its delta.

Merge methods read them, and `tasks.statistics` measures and stores them.
"""
