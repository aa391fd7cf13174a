"""What do a run's models tell before it starts? `check --models`."""
