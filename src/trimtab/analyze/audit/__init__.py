"""Whether a control token can be typed into a model (``spoof``), or coaxed out of it (``leak``)."""
