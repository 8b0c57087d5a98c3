"""What can be pruned in a model."""
