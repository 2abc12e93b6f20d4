"""Turn a pretrained transformer into a hybrid student, distil it, and score it by generation."""

__version__ = "0.1.0"
