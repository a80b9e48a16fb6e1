"""Adapters for other people's loaders, one file or folder each; nothing is touched before it is asked for."""
