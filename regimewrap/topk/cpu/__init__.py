"""The selection on CPUs, compiled by numba."""
