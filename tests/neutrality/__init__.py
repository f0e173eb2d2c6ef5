"""Measuring in the middle of training, and being cut short while measuring, changes no bit of the training."""
