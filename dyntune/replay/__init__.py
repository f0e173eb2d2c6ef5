"""Counterfactual replay: the last steps trained once more on a twin, each time with one change."""
