"""What looks at, checks, rewrites and publishes results. Loading does without it."""
