"""Several runs, one question: which method, which settings, on which devices."""
