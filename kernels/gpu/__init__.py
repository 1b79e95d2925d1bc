"""GPU kernels in Triton: importing a module here imports triton, and never asks for a GPU."""
