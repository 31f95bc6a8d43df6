"""Use the result: generate text."""
