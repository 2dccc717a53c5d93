"""Several processes that share a run: who talks to whom, and the order of all sums."""
