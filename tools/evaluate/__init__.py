"""Measures what a model says against what it should have said: words, characters, and the times of words."""
