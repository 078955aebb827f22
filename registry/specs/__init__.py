"""Line and task files: strict YAML read into frozen data with a digest.

The ledger, the flows and the command line import it.
"""
