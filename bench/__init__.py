"""Measurements that `make bench` runs and writes into docs/benchmarks.md."""
