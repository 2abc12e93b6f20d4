"""Measure our ops beside those of another library, in one process."""
