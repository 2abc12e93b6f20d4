"""From a recipe to a report: the steps of a run, where they live, their plan beforehand. Top of the house."""
