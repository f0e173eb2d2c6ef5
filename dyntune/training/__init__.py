"""Parts of a training loop that a recommendation asks for, ready-made."""
