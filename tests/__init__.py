"""The tests of the package, of the notebooks and of the programs."""
