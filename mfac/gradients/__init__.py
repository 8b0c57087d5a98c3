"""Gradients for the Fisher: the buffer that holds them, and where they come from."""
