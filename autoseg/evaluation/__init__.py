"""How good predictions are: metrics of a case and their summary over cases."""
