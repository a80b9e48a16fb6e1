"""Ways to choose the codes of a weight that know more than the weight: what went into the layer."""
