"""The file formats: checkpoints, sparse deltas, mask files and exports.

All rooms of `merging` except `numerics` import it; other packages open files through it.
"""
