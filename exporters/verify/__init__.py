"""Whether a file is what it should be: its contents, and what it computes."""
