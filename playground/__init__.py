"""A small self-made world for the demo and the tests."""
