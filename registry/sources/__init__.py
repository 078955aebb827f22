"""Where models are read from: a folder, a bucket, the hub or MLflow, pinned by digest.

`tasks.inputs` and the flows that register models import it.
"""
