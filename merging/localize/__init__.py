"""Localizers: each ranks the coordinates of one finetuned model.

`tasks.localizers` chooses one; TIES and the Fisher statistic reuse parts of two.
"""
