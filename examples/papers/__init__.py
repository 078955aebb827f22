"""The models, data sets and numbers of published tables: one paper file each, and their tasks.

There is no code here. `registry.specs.paper` reads the files for `restitch study paper`.
"""
