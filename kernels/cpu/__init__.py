"""CPU kernels, compiled by numba: importing a module here imports numba."""
