"""Turn a pretrained model into a hybrid student: plan, execute, probe."""
