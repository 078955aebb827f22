"""What a model is: families, data sets, heads, evaluation and finetuning.

`tasks` and `flows` import it; it knows nothing of the store, MLflow or Prefect.
"""
