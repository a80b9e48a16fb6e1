"""What goes into the linear layers of a running model, summed up for the converter."""
