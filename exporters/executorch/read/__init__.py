"""Readers of ``.pte`` files."""
