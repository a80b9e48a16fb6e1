"""vLLM (0.30): its loader reads our MXFP4 language models, found by its own entry point; vLLM-Omni builds on it."""
