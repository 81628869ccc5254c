"""Passes of the ExecuTorch target."""
