"""restitch keeps one merged model that holds the skills of many finetuned models.

The parts lie in the sub-packages `merging`, `modeling`, `registry`, `tasks`, `flows`,
`deployments` and `cli`; in a checkout each of them is a folder at the root.
"""

__version__ = "0.1.0"
