"""Declare lines and tasks, and adopt models that were registered in MLflow.

The command line and the flows at the root import it.
"""
