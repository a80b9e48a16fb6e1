"""numba twins of the contract's codec: the same bytes at the speed of memory."""
