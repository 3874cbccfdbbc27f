"""Checkpoint files → TensorFlow checkpoints: rule tables are data, one engine applies them, nothing is written unless all holds."""
