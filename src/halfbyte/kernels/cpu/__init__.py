"""The operations for CPUs, compiled by numba."""
