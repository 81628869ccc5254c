"""A reference interpreter of Core ML's MIL, in torch."""
