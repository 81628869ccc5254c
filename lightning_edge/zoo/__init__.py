"""Reference networks, data modules and a training task for the recipes, the benchmarks and the tests."""
