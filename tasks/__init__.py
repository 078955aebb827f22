"""Steps: each loads its inputs by reference, computes, stores the result, returns a reference.

Flows call steps; no step calls a flow.
"""
