"""Alpha: the weights on the groups, the only state."""
