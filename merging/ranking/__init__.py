"""Task vectors, and which of a model's coordinates have the k largest scores.

Localizers, merge rules and the steps in `tasks` import it.
"""
