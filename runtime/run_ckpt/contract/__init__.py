"""What the bytes of a converted checkpoint mean; imports nothing else of ours."""
