"""How fast gram_jax is beside what a user would run instead: `make bench`, or one of them alone.

Every benchmark is a command, ``python -m benchmarks.NAME``; ``--help`` says what it measures.
(`gram_jax.benchmarks` is something else: evaluation sets that others published.)
"""
