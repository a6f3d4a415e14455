"""Choose the batch: teacher embeddings to neighbours, to a signed graph, to equal clusters, to a plan. Imports errors, files and plan; no training code."""
