"""Guarded short training runs on a twin: cloned parameters, an optimizer of its own; the user's are never stepped."""
