"""What a Prefect server must hold: pools, deployments, triggers and schedules.

`local`, the containers and the command line import it.
"""
