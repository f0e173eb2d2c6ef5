"""Tests of dyntune.plots."""
