"""Pure tensors: checkpoints, sparse deltas, localization, stitching and merge methods."""
