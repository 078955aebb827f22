"""Servers and workers on one machine: start, stop and examine them.

The command line imports it.
"""
