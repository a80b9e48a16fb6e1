"""Ways to multiply by a quantized weight, one file each; table.py holds their order."""
