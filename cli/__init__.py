"""The `restitch` command: arguments, help and the look of results.

Nothing imports it but the playground.
"""
