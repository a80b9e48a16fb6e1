"""SGLang's diffusion runtime (0.5.23): its loader reads our MXFP4 checkpoints, found by its own entry point."""
