"""Exchanges and signs of hidden units, which leave a network's function as it is."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hvpspec.errors import InputError
from hvpspec.landscape.critical import CriticalPoint
from hvpspec.landscape.landscapes import NetworkLandscape
from hvpspec.results import Result

# Activations with phi(-x) = -phi(x).
_ODD = (nn.Tanh, nn.Tanhshrink, nn.Identity)
# What acts on each unit by itself; pooling and reshaping are linear, so that signs pass them.
_EACH_UNIT = (
    *_ODD, nn.Sigmoid, nn.Softplus, nn.GELU, nn.SiLU, nn.LogSigmoid, nn.ReLU,
    nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Flatten, nn.Dropout,
)  # fmt: skip
_LINEAR = (nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Flatten, nn.Dropout)

# So many random elements all happen to belong to a proper subgroup in one of a million cases.
_CHECKED = 20

#: Each element of a group as an index and a sign for each coordinate: ``theta[index] * sign``.
_Map = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False, repr=False)
class Symmetries(Result):
    """The group of signed exchanges of coordinates that leave a landscape as it is.

    Attributes:
        indices: shape (m, n), m the order of the group.
        signs: shape (m, n); an element maps theta to ``theta[indices[k]] * signs[k]``.
    """

    indices: Tensor
    signs: Tensor

    @property
    def order(self) -> int:
        """The number of elements."""
        return len(self.indices)

    def images(self, theta: Tensor) -> Tensor:
        """All images of a point, shape (m, n); a point with symmetries of its own comes up again.

        Args:
            theta: shape (n,).
        """
        return theta[self.indices.to(theta.device)] * self.signs.to(theta)

    def orbit_size(self, point: CriticalPoint) -> int:
        """The number of different critical points among the images of one.

        By the orbit-stabiliser theorem it is the order of the group over the number of images that
        are the point itself.
        """
        distances = torch.linalg.vector_norm(self.images(point.theta) - point.theta, dim=1)
        return self.order // int(point.holds(distances, point.ball).sum())

    def _brief(self) -> dict[str, object]:
        """What ``repr`` shows."""
        return {"order": self.order, "n": self.indices.shape[1]}


def symmetries(F: NetworkLandscape, *, max_order: int = 10_000) -> Symmetries:
    """The exchanges of hidden units, and their signs where the activation is odd.

    They are read off an ``nn.Sequential`` of ``Linear``, ``Conv2d`` (whose channels are the units),
    activations, average pooling and ``Flatten``. A layer with h units between two whose parameters
    are selected has ``h!`` orders, and ``2^h`` signs for ``Tanh``. Those that change l2 or the tilt
    are left out.

    Args:
        F: the landscape.
        max_order: the largest group that is listed.

    Returns:
        The group, all its elements one by one.

    Raises:
        InputError: the network is not of this kind, or its group is larger, or f is not the same at
            an image of a point, as with parameters or layers that are used twice.

    Example:
        >>> net = nn.Sequential(nn.Linear(1, 2), nn.Tanh(), nn.Linear(2, 1))
        >>> data = torch.ones(3, 1), torch.zeros(3, 1)
        >>> symmetries(NetworkLandscape(net, nn.MSELoss(), data, l2=0.1)).order
        8
    """
    space = F.objective.space
    layers = _layers(F.objective.model)
    parameters = F.objective.parameters()
    places = space.unflatten(torch.arange(F.n))
    groups: list[list[_Map]] = []
    order = 1
    affine = [
        k for k, (_, module) in enumerate(layers) if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    for first, second in itertools.pairwise(affine):
        (name, here), (following, _) = layers[first], layers[second]
        between = [module for _, module in layers[first + 1 : second]]
        rows = [f"{name}.weight", *([f"{name}.bias"] if here.bias is not None else [])]
        if not {*rows, f"{following}.weight"} <= places.keys():
            continue  # what is held fixed cannot be exchanged
        units = len(parameters[rows[0]])
        is_odd = all(isinstance(module, (*_ODD, *_LINEAR)) for module in between)
        order *= math.factorial(units) * (2**units if is_odd else 1)
        if order > max_order:
            raise InputError(
                f"the group has {order:,} elements with the {units} units of layer {name!r}; pass "
                f"max_order to list more than {max_order:,}, or select fewer layers with params="
            )
        columns = places[f"{following}.weight"]
        columns = columns.reshape(len(columns), units, -1)
        blocks = [places[row].reshape(units, -1).T for row in rows] + [columns.transpose(1, 2)]
        coordinates = torch.cat([block.reshape(-1, units) for block in blocks])
        signs = itertools.product((1.0, -1.0), repeat=units) if is_odd else [(1.0,) * units]
        pairs = itertools.product(itertools.permutations(range(units)), signs)
        groups.append([_map(F.n, coordinates, *pair) for pair in pairs])
    elements = [_composed(F.n, maps) for maps in itertools.product(*groups)]
    l2, tilt = F.l2.cpu(), F.tilt.cpu()
    kept = [
        (index, sign)
        for index, sign in elements
        if torch.equal(l2[index], l2) and torch.equal(tilt[index] * sign, tilt)
    ]
    found = Symmetries(*(torch.stack(parts) for parts in zip(*kept, strict=True)))
    _check(F, found)
    return found


def _check(F: NetworkLandscape, found: Symmetries) -> None:
    """Compare f at a point and at some images: of a false group at least every other one differs.

    Raises:
        InputError: f differs.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(F.n, generator=generator, dtype=F.dtype).to(F.device)
    theta = F.start + noise * max(1e-2, float(F.start.abs().mean()))
    value = F.value(theta)
    some = torch.randperm(found.order, generator=generator)[:_CHECKED]
    for image in Symmetries(found.indices[some], found.signs[some]).images(theta):
        # Sums of n terms in another order differ by some n u.
        if not abs(F.value(image) - value) <= 1e-9 * max(abs(value), 1e-9):
            raise InputError(
                "an exchange of hidden units changes f: layers or parameters are used twice, have "
                "hooks, or act on other dimensions than those of units"
            )


def _layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers of a sequential network with their names, from the first to the last."""
    found: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        if type(module) is nn.Sequential:
            continue
        is_plain = isinstance(module, nn.Conv2d) and module.groups == 1
        if not (is_plain or type(module) in (nn.Linear, *_EACH_UNIT)):
            raise InputError(
                f"symmetries are read off an nn.Sequential of Linear, Conv2d, activations and "
                f"average pooling, but {name or 'the network'!r} is {type(module).__name__}"
            )
        found.append((name, module))
    return found


def _map(n: int, coordinates: Tensor, order: tuple[int, ...], signs: tuple[float, ...]) -> _Map:
    """The map that puts unit ``order[j]`` times ``signs[j]`` into the place of unit j.

    Args:
        n: the number of all coordinates.
        coordinates: those of each unit, shape (c, h).
        order: a permutation of the units.
        signs: of the units.
    """
    index, sign = torch.arange(n), torch.ones(n, dtype=torch.float64)
    index[coordinates] = coordinates[:, list(order)]
    sign[coordinates] = torch.tensor(signs, dtype=torch.float64).expand(coordinates.shape)
    return index, sign


def _composed(n: int, maps: tuple[_Map, ...]) -> _Map:
    """One map after the other."""
    index, sign = torch.arange(n), torch.ones(n, dtype=torch.float64)
    for after, signs in maps:
        index, sign = index[after], sign[after] * signs
    return index, sign
