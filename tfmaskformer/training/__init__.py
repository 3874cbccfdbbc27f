"""Training as the official code trains: recipes, learning rates, parameter groups, optimizers."""
