"""The network as one graph of ATen operations."""
