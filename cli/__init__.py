"""The restitch command."""
