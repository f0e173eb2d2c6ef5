"""Numerical core: tensors and callables in, numbers out; no module or optimizer in sight."""
