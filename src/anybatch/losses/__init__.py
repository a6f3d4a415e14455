"""Outlive the batch: one tiled softmax engine, rules and memory over it, one Module a method. Imports errors and distributed."""
