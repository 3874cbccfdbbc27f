"""Parity with the official PyTorch code: record what it computes, run TensorFlow on the same, compare, account for everything."""
