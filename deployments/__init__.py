"""Unattended operation: on one machine, and for a team.

The command line imports it.
"""
