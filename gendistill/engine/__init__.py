"""Fast ways to train through a decoder: what its modules compute, in fewer and larger steps."""
