"""The judge of beta2: brute force over beta2, learning rate and batch size, and what is to be beaten."""
