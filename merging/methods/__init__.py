"""Merge methods, one file each; `registry` finds them and resolves their settings.

Other packages import `methods.registry` only, never a method.
"""
