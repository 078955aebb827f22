"""The `restitch` command.

Nothing imports it but the playground.
"""
