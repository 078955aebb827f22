"""Adapters: LoRA, DoRA and (IA)^3 factors of PEFT, read as a checkpoint that is computed.

`merging.localize`, `merging.methods` and `tasks.inputs` import it.
"""
