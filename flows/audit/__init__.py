"""Answers for auditors: queries, comparisons of versions, reports and links.

The command line, and flows that update the MLflow projection, import it.
"""
