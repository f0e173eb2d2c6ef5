"""Objectives: batches, losses, parameters, state, and Hessian-vector products."""
