"""A new checkpoint made of a converted one."""
