"""Ground floor: what a block of weights is, and the code over blocks. Knows no file, no graph, no model."""
