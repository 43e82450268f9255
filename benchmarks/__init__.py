"""The benchmarks: this worker beside a straightforward one, on the same servers, with the same events."""
