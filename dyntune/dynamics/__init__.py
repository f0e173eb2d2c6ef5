"""Gradients over time: what they remember, how noisy they are, what each tensor does. No hook, schedule or log here."""
