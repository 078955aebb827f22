"""The state of a line, its audit trail, and the records of merged versions.

It is the only way to change a line; flows, audits and the MLflow projection import it.
"""
