"""A checkpoint becomes a module that runs."""
