"""The spectral measure of an operator, from which densities, counts and traces follow."""

from __future__ import annotations

from dataclasses import replace
from os import PathLike
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hvpspec.errors import InputError
from hvpspec.linalg.krylov import LanczosRun, lanczos
from hvpspec.linalg.operator import SymmetricOperator, as_operator, require_scale
from hvpspec.linalg.probes import (
    ProbeKind,
    probes_for,
    require_count,
    require_same_state,
    seeded,
)
from hvpspec.linalg.ranks import Ranks
from hvpspec.progress import Progress, shown
from hvpspec.spectrum.slq import SpectralMeasure

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def spectral_measure(
    A: SymmetricOperator | Tensor,
    num_probes: int = 8,
    num_steps: int = 100,
    *,
    generator: torch.Generator | None = None,
    probes: ProbeKind = "gaussian",
    reorthogonalize: bool = True,
    block_size: int | None = None,
    basis_folder: str | PathLike[str] | None = None,
    group: ProcessGroup | None = None,
    progress: Progress | bool | None = None,
) -> SpectralMeasure:
    """Stochastic Lanczos quadrature: run Lanczos from random vectors and keep what it saw.

    The measure ``sum_k w_k delta(theta_k)`` of a probe z, of mass 1, has the first ``2 num_steps``
    moments (degrees 0 to ``2 num_steps - 1``) of ``z^T delta(A - x) z / |z|^2``, whose expectation
    is the spectral measure of A.

    Args:
        A: a symmetric operator, or a symmetric matrix of shape (n, n).
        num_probes: how many random vectors.
        num_steps: Lanczos steps from each; more than n are not made.
        generator: source of the probes; None for one with seed 0.
        probes: ``"gaussian"``, for which counts have exact confidence intervals; ``"rademacher"``
            or ``"sphere"``.
        reorthogonalize: keep ``block_size * (num_steps + 1)`` vectors and the bases orthogonal.
            Without it memory is O(n), and only densities and estimates are offered.
        block_size: probes that advance together, by one block product a step; None for all.
        basis_folder: where bases lie on a disk instead of in memory, for operators on the CPU.
        group: processes that share out the probes, of which each multiplies by the whole operator,
            alone or together with others that have the rest of its data. All get the same measure.
        progress: True for a bar; or called with the products done and the most there will be.

    Returns:
        The measure.

    Raises:
        InputError: an argument is out of range, or the bases do not fit into memory.
        ComputationError: the products are not symmetric, or so small or large that their squares
            are no numbers in float64; or another process ended.

    Reference:
        Ghorbani, Krishnan & Xiao, An investigation into neural net optimization via Hessian
        eigenvalue density (2019), section 2; Golub & Meurant (2010), ch. 4 and 6.

    Example:
        >>> A = torch.diag(torch.tensor([-1.0, -1.0, 0.5, 3.0]))
        >>> measure = spectral_measure(A, generator=torch.Generator().manual_seed(0))
        >>> count = measure.count(below=0.0)
        >>> count.lower, count.upper, measure.num_matvecs
        (2, 2, 24)
    """
    operator = as_operator(A)
    if block_size is not None:
        require_count("block_size", block_size)
    n = operator.shape[0]
    require_count("num_probes", num_probes)
    ranks = Ranks(group)
    if num_probes < ranks.size:
        raise InputError(
            f"num_probes must be at least the number of processes, {ranks.size}, got {num_probes}"
        )
    generator = seeded(generator)
    require_same_state(generator, ranks)
    operator.check_symmetry()
    before = operator.num_matvecs
    Z = probes_for(operator, probes, num_probes, generator)
    Z = Z[:, ranks.rank :: ranks.size]  # all are drawn by all, and are the same for any number
    num_columns = Z.shape[1]
    blocks = list(torch.split(Z, block_size or num_columns, dim=1))
    del Z  # so that a single block goes as soon as its bases have begun
    runs: list[LanczosRun] = []
    with shown(progress, "spectral measure") as show:

        def report(_done: int, _total: int) -> None:
            """Count products over all blocks."""
            if show is not None:
                show(operator.num_matvecs - before, num_columns * min(num_steps, n))

        while blocks:
            with_bases = lanczos(
                operator,
                blocks.pop(0),
                num_steps,
                reorthogonalize=reorthogonalize,
                basis_folder=basis_folder,
                progress=report,
            )
            runs += [replace(run, basis=None, next_vector=None) for run in with_bases]
            del with_bases  # and with it the bases
    by_process = ranks.gather(runs)
    runs = [by_process[i % ranks.size][i // ranks.size] for i in range(num_probes)]
    require_scale(max(run.scale for run in runs), operator.dtype)
    return SpectralMeasure(
        dim=n,
        runs=tuple(runs),
        probes=probes,
        reorthogonalized=reorthogonalize,
        dtype=operator.dtype,
        num_matvecs=sum(ranks.gather(operator.num_matvecs - before)),
    )
