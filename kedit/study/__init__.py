"""Grids of trajectories: what a run covers, how it runs, what it found."""
