"""Heads and learning rates by brute force."""
