"""Read converted checkpoints: inspect, verify, dequantize, change their layout."""
