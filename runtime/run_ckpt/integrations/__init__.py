"""Adapters to the libraries that own the models; each file is used only when asked for."""
