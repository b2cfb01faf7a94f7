"""The data doctor: what is wrong with a data set, all of it at once."""
