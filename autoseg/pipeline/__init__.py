"""The stages over a whole data set, in order: check and plan, train, predict, evaluate and report."""
