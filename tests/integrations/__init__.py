"""Front doors, against the real frameworks."""
