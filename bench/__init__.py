"""Benchmarks: one command per question, floors and peers measured in the same run."""
