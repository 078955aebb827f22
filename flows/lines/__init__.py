"""How a line and its tasks are declared, and how models from MLflow are adopted.

The command line and the flows at the root import it.
"""
