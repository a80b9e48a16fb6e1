"""Threads, slabs and files: a plan is carried out."""
