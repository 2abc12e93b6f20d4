"""Public maths on [B, T, H, D] tensors."""
