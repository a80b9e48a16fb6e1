"""A converted checkpoint checked, byte by byte."""
