"""Twins of the contract's codec in vector code: the same bytes at the speed of memory."""
