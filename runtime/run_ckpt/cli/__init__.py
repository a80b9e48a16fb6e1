"""The command ``run-ckpt``."""
