"""Pairs and retrieval sets: readers, columns, pictures, the embedded sample."""
