"""From measurements and a budget to a plan: pure functions, no torch, no files of images."""
