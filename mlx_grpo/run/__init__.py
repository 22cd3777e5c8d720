"""What surrounds a training run: its directory, checkpoints, memory plan, ranks, terminal and trackers."""
