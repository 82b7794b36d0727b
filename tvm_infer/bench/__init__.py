"""Benchmarks: every figure that the documentation quotes comes from here."""
