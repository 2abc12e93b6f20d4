"""Models of any origin as folders of safetensors: hub ids, folders, packages, GGUF files."""
