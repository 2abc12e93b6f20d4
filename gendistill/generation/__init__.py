"""Generation from decoders that run fused: prompts in chunks, answers a token per row and step."""
