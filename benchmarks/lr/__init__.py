"""The judge of learning rates: scenarios on real data, real training, and brute-force sweeps to compare with."""
