"""relay beside its peers: throughput and whole-process CPU, measured in turn on one machine.

Not part of the installed package; run it from a checkout with `python -m benchmarks`.
"""
