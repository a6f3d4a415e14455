"""One run from one configuration: `job.train`, each of whose steps is a file."""
