"""Content-addressed objects, and the folder that keeps them.

All other rooms of `registry` may import it.
"""
