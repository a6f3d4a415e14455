"""Pairs and retrieval sets: readers, columns, images, the embedded sample."""
