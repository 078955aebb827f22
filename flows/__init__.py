"""The flows: register, onboard, remerge, evaluate, export, and the decisions of people.

The command line, the deployments and the playground import them.
"""
