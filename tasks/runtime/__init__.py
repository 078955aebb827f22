"""What steps run on: the engine, the workspace, progress reporting, events and leases.

It imports no other room of `tasks`, and all of them import it.
"""
