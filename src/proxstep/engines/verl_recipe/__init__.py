"""A recipe as a run of verl: its data, its hydra overrides, its process and its metrics."""
