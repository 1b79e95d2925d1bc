"""Second floor: checkpoints to GGUF, and GGUF to GGUF. Knows files and names, never runs a model."""
