"""The PyTorch model put together from transformers parts, to compare the engine with."""
