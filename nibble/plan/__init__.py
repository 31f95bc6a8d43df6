"""Decide before spending: concrete settings for every auto value."""
