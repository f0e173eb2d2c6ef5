"""The loss as a function of the parameters; everything awkward about real models is dealt with here, once."""
