"""The commands, one file per subject; each checks its arguments before it imports torch.

`cli.main` imports them and gives each its place in `restitch --help`.
"""
