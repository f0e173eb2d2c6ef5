"""Tests of dyntune.report."""
