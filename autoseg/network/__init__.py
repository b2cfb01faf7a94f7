"""The network: built from its plan alone."""
