"""The inputs of steps: checkpoints, task data and heads, checked against their digests.

The steps in `tasks` and the flows import it.
"""
