"""Specialists: one model per task from one shared multi-task vector.

Merge methods of kind `experts` make them, and `tasks` stores and opens them.
"""
