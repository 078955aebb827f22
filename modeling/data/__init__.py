"""Find, read and decode the rows of data sets.

Heads, families and `tasks.inputs` import it.
"""
