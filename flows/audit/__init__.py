"""Answers for auditors: queries, differences, reports and links.

The command line, and flows that update the MLflow projection, import it.
"""
