"""Models written once, in graph ops."""
