"""What a step reads: checkpoints, task data and heads, opened and checked against digests.

The steps and the flows import it.
"""
