"""Which precision each layer gets."""
