"""The project's own launches, compiled as for a GPU that is not there and executed on a CPU."""
