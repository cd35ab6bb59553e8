"""Samples of MNIST and Fashion-MNIST, shipped with the package.

Each ``.npz`` file holds 2,000 training and 500 test images with their labels, as many of every
class, so that examples and tests need no download. ``LICENSE-MNIST`` and ``LICENSE-Fashion-MNIST``
state their terms and ``SHA256SUMS`` their checksums. In a clone of the project, ``python -m
tests.zoo.rebuild_samples`` makes them again.
"""
