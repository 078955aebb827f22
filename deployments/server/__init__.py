"""Pools, deployments, triggers and schedules of a Prefect server.

`local`, the containers and the command line import it.
"""
