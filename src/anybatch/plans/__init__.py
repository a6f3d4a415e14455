"""The batches of a training: the plan, its file, its sampler."""
