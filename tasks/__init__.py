"""Steps: each loads references, calls one function, stores its result and returns a reference.

`flows` calls them; no step calls a flow.
"""
