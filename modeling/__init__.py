"""What a model is: families, datasets, heads and evaluation."""
