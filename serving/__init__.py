"""Use merged versions where models run: complete folders, MLflow models, a followed version.

`tasks` and all packages above it import it, and so does the process that serves a model; it knows
no Prefect.
"""
