"""The roof: the programs people start."""
