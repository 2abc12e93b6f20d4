"""Recipes: what a run is. Imports no torch."""
