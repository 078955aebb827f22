"""Arithmetic on the bits of weights: rounding, bitwise access and bisection.

It imports no other room; every room may import it.
"""
