"""Hessian spectra and Morse indices of neural-network loss landscapes.

``HessianOperator`` makes a symmetric operator from a network, a loss and data; ``index`` counts the
directions in which the loss goes down there, resolved from round-off. The public names and the
rooms, such as ``hvpspec.linalg``, are listed in ``__init__.pyi`` and loaded when first used.
"""

from importlib.metadata import version

import lazy_loader

__version__ = version("hvpspec")

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
