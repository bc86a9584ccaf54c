"""A run on disk and on the screen: its folder, its metrics, its checkpoints."""
