"""The parts of `benchmarks/cuda.py`. Each is a generator of results and runs in a process of its own."""
