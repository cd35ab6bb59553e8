"""Hessian spectra and Morse indices of neural-network loss landscapes.

``HessianOperator`` represents the Hessian of a network, a loss and data; ``index`` counts its
negative eigenvalues, apart from round-off. All public names and subpackages are listed in
``__init__.pyi`` and loaded when they are first used.
"""

from importlib.metadata import version

import lazy_loader

__version__ = version("hvpspec")

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
