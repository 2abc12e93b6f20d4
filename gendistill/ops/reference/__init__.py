"""Eager torch that defines every op."""
