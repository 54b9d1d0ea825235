"""Benchmarks of speed, traffic and exactness."""
