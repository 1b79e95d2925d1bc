"""Training of MOSS-Audio models: from scratch, of all parameters, or of LoRA adapters."""
