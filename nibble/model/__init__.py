"""A frozen base and the low-rank update."""
