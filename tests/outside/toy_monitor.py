"""A monitor from outside: one file."""

from __future__ import annotations


class Norms:
    """The largest norm of a trained tensor, in every log line."""

    when = "log"
    every = None

    def __init__(self, job):
        self.stage = job.name

    def __call__(self, run):
        return {"largest": max(float(value.detach().norm()) for value in run.trained.values())}
