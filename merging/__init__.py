"""Pure tensors: masks, sparse deltas, stitching and merge methods.

Every other package may import it; it imports only torch, numpy, safetensors, blake3 and the
standard library.
"""
