"""A small synthetic world for the demo and the tests: models, their data and their files."""
