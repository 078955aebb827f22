"""Rows of data sets: how they are found, read and decoded.

Heads, families and `tasks.inputs` import it.
"""
