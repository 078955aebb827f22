"""The runtime of steps: the engine, the workspace, progress, events and leases.

All other rooms of `tasks` import it; it imports none of them.
"""
