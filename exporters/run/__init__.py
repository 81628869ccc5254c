"""Runtimes: what a runner is, and a runner in a process of its own."""
