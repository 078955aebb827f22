"""How results look in a terminal, made from the same values as `--json`.

The commands import it.
"""
