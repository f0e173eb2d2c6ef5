"""Entropy coefficients and learning rates against exact problems and real training."""
