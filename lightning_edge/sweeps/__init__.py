"""Sweeps: many trainings of one configuration, judged by the files they export, down to the Pareto front."""
