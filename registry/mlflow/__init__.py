"""The readable projection of the ledger in MLflow, and models registered there by others.

Flows import `sync` and `external_models`; no other room writes to MLflow.
"""
