"""Reports, manifests and budgets."""
