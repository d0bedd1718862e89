"""Measurements behind the figures in the docs. Each module is a command: `python -m benchmarks.NAME --help`."""
