"""Which way of counting gives the published numbers: the counts, by every way there is.

A count of negative eigenvalues depends on the activation, the images in the Hessian, the precision,
how the matrix is assembled, the solver and the cutoff. One run is one spectrum: it answers for all
cutoffs at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from examples.paper.points import (
    STANDARD,
    Point,
    hessian_at,
    images_of,
    network_at,
    runs_at_points,
)
from examples.paper.results import Record
from hvpspec import HessianOperator, InputError, zoo

#: Cutoffs relative to the largest absolute eigenvalue; "floor" is n u, for the dtype's round-off u.
CUTOFFS: Mapping[str, float | None] = {
    "0": 0.0,
    "floor": None,
    **{f"1e-0{k}": 10.0**-k for k in range(8, 2, -1)},
}

#: Fields of a run that decide how long it takes.
COST = ("net", "images", "dtype", "solver", "assembly")

# With more images a product for every row takes minutes, and the matrix more than its solver: what
# differs by round-off alone is not tried there.
_MOST_IMAGES_FOR_PRODUCTS = 128
_MOST_IMAGES_FOR_EIG = 1000

# What can differ in counting, but for the images.
_WAY = ("solver", "assembly", "dtype", "sample", "head")

# Unit vectors that are multiplied at once.
_COLUMNS = 256


@dataclass(frozen=True, kw_only=True)
class ProtocolRun(Point):
    """One spectrum, computed as a script might.

    Attributes:
        images: the Hessian is that of the mean loss over so many training images.
        dtype: ``float32`` or ``float64``, of the network, the matrix and the solver.
        assembly: ``blocks``, as `HessianOperator.to_dense`, which is exactly symmetric; or
            ``products``, by double backward for each unit vector and as it comes, which is what
            `torch.autograd.functional.hessian` does.
        solver: ``eigvalsh`` of LAPACK for symmetric matrices, which reads one triangle; ``eig`` for
            any matrix, of which real parts are counted; or ``eigvalsh-live``, of the rows that are
            not exactly zero, the others being eigenvalues 0. These ``eig`` finds, too, since it
            balances the matrix first (LAPACK's ``gebal``), while ``eigvalsh`` mixes them with the
            rest, and gives some ±1e-17.
        sample: which images: the ``first``, or ``random`` ones, drawn by the seed.
    """

    images: int
    dtype: str
    assembly: str
    solver: str
    sample: str = "first"


def protocol_runs(
    nets: Sequence[str],
    data: Sequence[str],
    activations: Sequence[str],
    seeds: int,
    epochs: Sequence[int],
    images: Sequence[int],
    dtypes: Sequence[str],
    solvers: Sequence[str] = (),
    assemblies: Sequence[str] = (),
    samples: Sequence[str] = ("first",),
    heads: Sequence[str] = ("logits",),
) -> list[ProtocolRun]:
    """List the runs of a search: all of the first seed first, and of few images before many.

    Args:
        nets: names of networks.
        data: names of data sets.
        activations: of the networks.
        seeds: how many, from 0.
        epochs: lengths of training; 0 for initial weights.
        images: numbers of images in the Hessian.
        dtypes: names of floating-point types.
        solvers: none for ``eigvalsh``, with ``eig`` for the CNN up to 1,000 images; it takes many
            minutes on a perceptron's matrix, where ``eigvalsh-live`` stands for it.
        assemblies: none for ``blocks``, and for the CNN up to 128 images ``products`` too.
        samples: which images.
        heads: what the networks return.
    """
    protocols = [STANDARD.for_epochs(length) for length in epochs]
    runs = []
    for count, net in product(sorted(images), nets):
        ways: Iterable[tuple[Any, ...]] = product(
            solvers or _default_solvers(net, count),
            assemblies or _default_assemblies(net, count),
            dtypes,
            samples,
            heads,
        )
        for way in ways:
            settings = dict(zip(_WAY, way, strict=True))
            points = [net], data, activations, seeds, protocols
            runs += runs_at_points(ProtocolRun, *points, images=count, **settings)
    return sorted(runs, key=lambda run: run.seed)


def _default_solvers(net: str, images: int) -> tuple[str, ...]:
    """The solvers that are cheap enough."""
    if net != "cnn":
        return ("eigvalsh", "eigvalsh-live")
    return ("eigvalsh", "eig") if images <= _MOST_IMAGES_FOR_EIG else ("eigvalsh",)


def _default_assemblies(net: str, images: int) -> tuple[str, ...]:
    """The ways to assemble that are cheap enough."""
    small = net == "cnn" and images <= _MOST_IMAGES_FOR_PRODUCTS
    return ("blocks", "products") if small else ("blocks",)


def measure_protocol(run: ProtocolRun, *, out: Path, data_dir: Path | None) -> Record:
    """Compute one spectrum as a plain script would, and count at every cutoff.

    The whole matrix goes to the solver, zero rows too. ``tau`` is the cutoff "floor": n u times the
    largest absolute eigenvalue. ``counts`` has the number below each of `CUTOFFS`, ``zero_rows``
    that of rows that are exactly zero.

    Args:
        run: what to compute.
        out: folder of the results, with the checkpoints.
        data_dir: folder of the full data sets.

    Raises:
        HvpspecError: the data are not found, do not suffice or do not fit into memory, or training
            diverged.
    """
    model = network_at(run, out=out, data_dir=data_dir)
    data = _sampled(images_of(run.data, data_dir), run)
    dtype = getattr(torch, run.dtype)
    if run.assembly == "blocks":
        hessian = hessian_at(model, data, dtype)
        matrix = hessian.to_dense()
    else:
        hessian = plain_hessian(model, data.tensors, dtype)
        matrix = by_products(hessian)
    values = eigenvalues(matrix, run.solver).double()
    n, scale = len(values), float(values.abs().max())
    floor = n * torch.finfo(matrix.dtype).eps / 2
    taus = {name: scale * (floor if part is None else part) for name, part in CUTOFFS.items()}
    counts = {name: int((values < -tau).sum()) for name, tau in taus.items()}
    bound = hessian.structural_upper_bound()
    _, accuracy = zoo.evaluate(model, data)
    return {
        "state": run.state,
        "dim": n,
        "tau": taus["floor"],
        "index": counts["floor"],
        "raw_count": counts["0"],
        "nullity": int((values.abs() <= taus["floor"]).sum()),
        "grad_norm": float(hessian.gradient().norm()),
        "loss": hessian.loss(),
        "accuracy": accuracy,
        "norm": scale,
        "bound": bound.upper if bound else None,
        "zero_rows": int((~matrix.any(0)).sum()),
        "counts": counts,
    }


def _sampled(data: zoo.Dataset, run: ProtocolRun) -> zoo.Dataset:
    """The images in the Hessian."""
    first = data.subset(run.images)
    if run.sample == "first":
        return first
    if run.sample != "random":
        raise InputError(f"sample is {run.sample!r}; it must be first or random")
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(run.seed))
    drawn = order[: len(first)]
    return replace(data, inputs=data.inputs[drawn], targets=data.targets[drawn])


def plain_hessian(model: nn.Module, data: Any, dtype: torch.dtype) -> HessianOperator:
    """The Hessian of the mean cross-entropy, through the network as it is."""
    loss = nn.CrossEntropyLoss()
    return HessianOperator(model, loss, data, dtype=dtype, engine="double-backward")


def by_products(hessian: HessianOperator) -> Tensor:
    """The matrix row by row from products, shape (n, n), symmetric up to round-off.

    Args:
        hessian: the operator; its product with a unit vector is a row.
    """
    units = torch.split(torch.eye(hessian.shape[0], dtype=hessian.dtype), _COLUMNS, dim=1)
    return torch.cat([hessian.matmat(block).T for block in units])


def eigenvalues(matrix: Tensor, solver: str) -> Tensor:
    """The eigenvalues as a solver gives them, in the matrix's dtype, shape (n,).

    Args:
        matrix: shape (n, n).
        solver: for ``eig`` these are the real parts, in no order.
    """
    if solver == "eig":
        real: Tensor = torch.linalg.eigvals(matrix).real
        return real
    if solver == "eigvalsh":
        values: Tensor = torch.linalg.eigvalsh(matrix)
        return values
    live = matrix.any(0)
    values = torch.linalg.eigvalsh(matrix[live][:, live])
    return torch.cat([values, matrix.new_zeros(int((~live).sum()))])
