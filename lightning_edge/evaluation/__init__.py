"""Every form of a trained network on the user's own validation."""
