"""The command line: one module per command. Heavy imports happen inside each command's ``run``."""
