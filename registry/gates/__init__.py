"""The gates that a merged version must pass to be promoted: one file and one class for each gate.

`registry.specs` makes the keys of a line's file from them, and `flows.promotion` applies them.
"""
