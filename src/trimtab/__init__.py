"""Trimtab: the small levers that turn a language model's safety.

Floors, top to bottom; a lower floor never imports a higher one (``tests/test_imports.py`` holds this):

    cli > report > study > recipe > evaluate > generate > train > models      (torch from here up)
        > levers > corpus > data > world > artifact, types, config, errors, seeds   (torch-free)
"""

__version__ = "0.1.0"
