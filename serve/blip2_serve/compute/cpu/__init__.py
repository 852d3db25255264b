"""What torch has no fast way for on a CPU, compiled by numba. Nothing here is needed on a GPU."""
