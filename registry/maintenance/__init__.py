"""Everything that a store holds and what refers to it.

Verification, repair and garbage collection import it.
"""
