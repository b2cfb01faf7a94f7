"""Training: what a fold sees (sampling, augmentation), what it minimises, and the loop that survives interruptions."""
