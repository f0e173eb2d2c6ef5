"""Commands that need more than a few lines, one per file; :mod:`dyntune.cli` puts them together."""
