"""State that outlives a process: the store, the audit trail, the specs and the MLflow projection.

`tasks` and all packages above it import it; it knows no model and no Prefect.
"""
