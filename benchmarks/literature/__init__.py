"""Published results of online EM beside ours: `python -m benchmarks.literature`."""
