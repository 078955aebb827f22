"""Models: families, data sets, heads, evaluation and finetuning.

`tasks` and `flows` import it. It knows the descriptions of heads and data in `registry.specs`, and
nothing of the store, MLflow or Prefect.
"""
