"""Timing of safer_fast against plain PyTorch. Run from the repository: python -m benchmarks.bench_step."""
