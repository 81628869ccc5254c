"""The graph with fake-quantizers, as it is trained."""
