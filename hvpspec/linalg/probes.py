"""Random vectors with identity covariance, from an explicit generator."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from hvpspec.errors import InputError
from hvpspec.linalg.digests import tensor_digest
from hvpspec.linalg.memory import require_memory
from hvpspec.linalg.operator import SymmetricOperator
from hvpspec.linalg.ranks import ALONE, Ranks

#: The distributions of :func:`draw_probes`.
ProbeKind = Literal["gaussian", "rademacher", "sphere"]


def draw_probes(
    kind: ProbeKind,
    n: int,
    num_probes: int,
    generator: torch.Generator,
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    orthogonal_to: Tensor | None = None,
    ranks: Ranks = ALONE,
) -> Tensor:
    """Draw independent random vectors z with ``E[z z^T] = I``.

    They are drawn in float64 on the generator's device and then converted, so that the same
    generator gives the same vectors for every dtype and device.

    Args:
        kind: ``"gaussian"``, ``"rademacher"`` (entries +1 and -1) or ``"sphere"`` (uniform on the
            sphere of radius sqrt(n)).
        n: length of a vector.
        num_probes: how many.
        generator: the source of randomness, which is advanced.
        dtype: of the result.
        device: of the result.
        orthogonal_to: orthonormal rows, shape (d, n), whose span is projected out.
        ranks: the processes, each of which has its share of the columns of ``orthogonal_to``, and
            all of which draw the same, from generators of the same kind and state.

    Returns:
        The probes as columns, shape (n, num_probes).

    Raises:
        InputError: the kind or generator is none, or fewer than one probe is asked for; they do not
            fit into memory; or the processes have different generators.

    Example:
        >>> draw_probes("rademacher", 4, 2, torch.Generator().manual_seed(0)).abs().sum()
        tensor(8., dtype=torch.float64)
    """
    require_count("num_probes", num_probes)
    if not isinstance(generator, torch.Generator):
        raise InputError(
            "generator must be a torch.Generator, such as torch.Generator().manual_seed(0), got "
            f"{generator!r}"
        )
    require_same_state(generator, ranks)
    entry = 8 if dtype == torch.float64 else 8 + dtype.itemsize
    with ranks.together():
        what = f"drawing {num_probes} probes of length {n} in float64"
        require_memory(num_probes * n * entry, what, generator.device, "fewer (num_probes)")
    Z = torch.empty(num_probes, n, dtype=torch.float64, device=generator.device)
    if kind == "rademacher":
        Z.random_(0, 2, generator=generator).mul_(2).sub_(1)
    elif kind in ("gaussian", "sphere"):
        Z.normal_(generator=generator)
        if kind == "sphere":
            Z *= n**0.5 / torch.linalg.vector_norm(Z, dim=1, keepdim=True)
    else:
        raise InputError(f"kind must be 'gaussian', 'rademacher' or 'sphere', got {kind!r}")
    Z = Z.to(device, dtype)
    if orthogonal_to is not None:
        own = Z[:, ranks.share(n)]
        for _ in range(2):  # the second pass removes the round-off of the first
            own -= ranks.sum_(own @ orthogonal_to.mT) @ orthogonal_to
        Z = ranks.whole(own, n)
    return Z.T


def probes_for(
    A: SymmetricOperator,
    kind: ProbeKind,
    num_probes: int,
    generator: torch.Generator,
    orthogonal_to: Tensor | None = None,
) -> Tensor:
    """Draw vectors that an operator can multiply; see :func:`draw_probes`."""
    return draw_probes(
        kind,
        A.shape[0],
        num_probes,
        generator,
        dtype=A.dtype,
        device=A.device,
        orthogonal_to=orthogonal_to,
        ranks=A.ranks,
    )


def seeded(generator: torch.Generator | None) -> torch.Generator:
    """The generator; where there is none, one with seed 0, so that answers can be repeated."""
    return torch.Generator().manual_seed(0) if generator is None else generator


def require_same_state(generator: torch.Generator, ranks: Ranks) -> None:
    """Raise InputError in all processes unless all would draw the same."""
    if ranks.size > 1 and len(set(ranks.gather(tensor_digest([generator.get_state()])))) > 1:
        raise InputError(
            "generator: the processes have generators in different states; seed all of them "
            "alike, as with torch.Generator().manual_seed(0)"
        )


def require_count(name: str, value: int) -> None:
    """Raise InputError unless ``value`` is a whole number of at least 1."""
    if not hasattr(value, "__index__") or value < 1:
        raise InputError(f"{name} must be a whole number of at least 1, got {value}")
