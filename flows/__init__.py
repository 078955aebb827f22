"""The flows onboard and remerge."""
