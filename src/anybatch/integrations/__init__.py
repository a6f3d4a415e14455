"""Guests: sentence-transformers and others, each imported inside its own file. Imports every room but report and cli."""
