"""Convert safetensors checkpoints to MXFP4 or FP8, file to file."""
