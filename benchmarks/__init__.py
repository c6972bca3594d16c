"""The same work side by side, run from the root of the repository: `python -m benchmarks.NAME`."""
