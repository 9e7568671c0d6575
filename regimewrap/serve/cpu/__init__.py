"""Products that skip the zeros of their input, compiled by numba; imported only when something is served."""
