"""Ways to multiply by a quantized weight, one file each; select.py holds their order."""
