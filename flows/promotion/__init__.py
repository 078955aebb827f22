"""The rules of promotion: candidates, gates, transitions and the choice of a method.

Pure decisions without Prefect; the other rooms of `flows` import it.
"""
