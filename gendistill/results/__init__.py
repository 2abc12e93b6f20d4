"""Measured results: how a run becomes a results file, and a results file a table of the documentation."""
