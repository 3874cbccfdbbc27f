"""What is known of the official checkpoints, and synthetic ones in their place; imports NumPy at most."""
