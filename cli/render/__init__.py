"""The look of results in a terminal, made from the same values as `--json`.

The commands and the playground import it.
"""
