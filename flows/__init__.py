"""What a person or an event starts: register, onboard, remerge, evaluate, export, decide.

The command line, the deployments and the playground import it.
"""
