"""Measure: retrieval metrics on ranked ids. Imports errors."""
