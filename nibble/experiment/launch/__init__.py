"""Jobs for other machines: what they run, and one file for each kind of place that runs them."""
