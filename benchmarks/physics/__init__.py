"""Known effects of training dynamics, reproduced with dyntune's own measurements."""
