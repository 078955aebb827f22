"""Task vectors, and the selection of the coordinates with the k largest scores.

Localizers, merge rules and the steps in `tasks` import it.
"""
