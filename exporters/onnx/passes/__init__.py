"""Passes of the ONNX target."""
