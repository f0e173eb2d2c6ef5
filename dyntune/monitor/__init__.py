"""Measurements over time, and the record of them that everything above reads."""
