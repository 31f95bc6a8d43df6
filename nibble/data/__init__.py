"""Text to packed batches: read, render, mask, pack, load. Knows nothing of models."""
