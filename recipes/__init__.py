"""Recipes as they ship: ``recipe:<name>`` on the command line is ``<name>.yaml`` in this package."""
