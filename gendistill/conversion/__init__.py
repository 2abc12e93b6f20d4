"""Turn a pretrained checkpoint into a hybrid student: resolve, plan, execute, probe."""
