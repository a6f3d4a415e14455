"""anybatch: contrastive training at any batch size. The public names, imported lazily; nothing else."""

__version__ = "0.1.0"
