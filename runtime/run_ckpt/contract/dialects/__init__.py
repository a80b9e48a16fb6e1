"""The vocabularies of the consumers, one file each: which tensors they name how, and what their config.json says."""
