"""What an ExecuTorch file holds."""
