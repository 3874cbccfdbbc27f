"""Rule tables: which tensor of a checkpoint becomes which variable, one rule a line."""
