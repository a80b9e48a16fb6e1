"""vLLM-Omni (0.30): its loader reads our MXFP4 checkpoints, found by its own entry point."""
