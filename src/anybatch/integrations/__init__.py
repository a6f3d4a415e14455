"""Trainers that anybatch plugs into: sentence-transformers, imported inside its own files."""
