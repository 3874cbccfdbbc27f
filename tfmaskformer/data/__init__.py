"""Data sets: images with their ground truth."""
