"""One run from one configuration. `job.train` is the main job; each of its steps is a file.

`read_data` (pairs and held-out data), `try_step` (a few rows through the cached step), `folder` (one writer, records),
`teacher` and `make_plan` (the batches), `hard_negatives`, `train_model`, `evaluate_model`. `side_by_side`
trains several.
"""
