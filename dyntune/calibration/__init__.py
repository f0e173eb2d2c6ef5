"""How far predicted probabilities are from frequencies, and how sure that is."""
