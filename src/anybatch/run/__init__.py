"""One run from one configuration: folder and lock, data, plan, training, evaluation."""
