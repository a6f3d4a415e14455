"""Grow the batch: record embeddings, take the loss, replay. Imports errors and distributed."""
