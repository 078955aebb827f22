"""The commands, grouped as `restitch --help` shows them.

`cli.main` imports it.
"""
