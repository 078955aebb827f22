"""The health of a store: verification, repair, garbage collection and copies.

The command line imports it.
"""
