"""Stress tests: killed processes, fuzzing, hostile files, secrets and forbidden paths."""
