"""Curvature of the loss: operators, eigenvalues, spectral density, sharpness."""
