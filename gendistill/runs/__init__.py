"""Where the steps of runs live, and what a run folder shows of them."""
