"""One file per knob: a pure rule, and the function that measures and applies it."""
