"""Token mixers as plain modules."""
