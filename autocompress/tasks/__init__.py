"""Tasks: a trained model with its data, loss and metric."""
