"""Passes of the TensorFlow Lite target."""
