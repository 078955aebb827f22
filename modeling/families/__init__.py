"""Model families, one file each; `family` defines their interface and finds them.

Other rooms import `families.family` only, never an architecture.
"""
