"""Triton twins of the decoder, equal to it bit for bit, and the products made with them."""
