"""The student as a Hugging Face model."""
