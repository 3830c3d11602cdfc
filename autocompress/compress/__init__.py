"""What happens to a model."""
