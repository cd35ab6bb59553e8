"""The numbers that the experiments are held against, and where they are from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

#: Where `PUBLISHED` is printed.
SOURCE = (
    "D. Akhtiamov and M. Thomson, Connectedness of loss landscapes via the lens of Morse theory,"
    " PMLR 197 (2023)"
)


#: What the networks are called there.
NAMES: Mapping[str, str] = {"cnn": "CNN", "mlp2": "2-MLP", "mlp3": "3-MLP"}


@dataclass(frozen=True)
class Published:
    """A published index: mean and standard deviation over ten runs."""

    mean: float
    std: float


#: The numbers of negative eigenvalues that `SOURCE` reports, by network, data and state.
PUBLISHED: Mapping[tuple[str, str, str], Published] = {
    ("cnn", "mnist", "trained"): Published(232.9, 2.88),
    ("cnn", "fashion-mnist", "trained"): Published(238.5, 4.88),
    ("cnn", "mnist", "random"): Published(182.91, 80.17),
    ("cnn", "fashion-mnist", "random"): Published(189.48, 79.85),
    ("mlp2", "mnist", "trained"): Published(1980.1, 130.4),
    ("mlp2", "fashion-mnist", "trained"): Published(3637.9, 119.92),
    ("mlp2", "mnist", "random"): Published(1186.2, 198.25),
    ("mlp2", "fashion-mnist", "random"): Published(2840.9, 387.35),
    ("mlp3", "mnist", "trained"): Published(2033.8, 124.00),
    ("mlp3", "fashion-mnist", "trained"): Published(3593.3, 208.61),
    ("mlp3", "mnist", "random"): Published(1410.3, 235.31),
    ("mlp3", "fashion-mnist", "random"): Published(2721.9, 272.12),
}


def published_text(net: str, data: str, state: str) -> str:
    """The published mean and standard deviation, if there are any.

    Args:
        net: the network.
        data: the data set.
        state: ``trained`` or ``random``.

    >>> published_text("cnn", "mnist", "trained")
    '232.9 ± 2.88'
    """
    found = PUBLISHED.get((net, data, state))
    return f"{found.mean:,.6g} ± {found.std:.5g}" if found else "–"
