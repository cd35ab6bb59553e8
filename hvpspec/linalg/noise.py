"""How far an operator's products are from those of the exact matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hvpspec.linalg.krylov import KrylovSpace
from hvpspec.linalg.operator import SymmetricOperator, require_scale
from hvpspec.linalg.probes import probes_for, seeded
from hvpspec.results import Result

#: Lanczos steps that find the norm; its top Ritz value is then within a few per cent.
_NORM_STEPS = 15


@dataclass(frozen=True, repr=False)
class Noise(Result):
    """The error of an operator's products, and the scale it is to be compared with.

    Attributes:
        floor: bound on the error ``||E||_2`` of the operator, in units of the eigenvalues.
        norm: spectral norm of the operator, to a few per cent.
        symmetry_defect: ``|x^T A y - y^T A x|`` for random unit vectors.
        source: how the floor was found, in words.
        num_matvecs: products spent, also those of a float64 copy.
    """

    floor: float
    norm: float
    symmetry_defect: float
    source: str
    num_matvecs: int


def measure_noise(A: SymmetricOperator, generator: torch.Generator | None = None) -> Noise:
    """Measure the error of an operator's products against its own float64 copy.

    For an error E without structure ``||E z||`` of a random unit vector z is half of ``||E||_2``;
    for one relative to the product it is largest along the dominant eigenvector. The larger of
    these two, doubled and doubled again for safety, is the floor. So is the symmetry defect, which
    a copy of higher precision may share (``|x^T E y - y^T E x|`` is about ``sqrt(2 / n) ||E z||``),
    if that is larger. Where there is no such copy, ``n u ||A||`` is the least that is claimed. What
    else is known of the error of products (``A.defect``) is added.

    Args:
        A: the operator.
        generator: the source of the random vectors; None for one with seed 0.

    Raises:
        ComputationError: the products are not symmetric, or so small or large that their squares
            are no numbers in float64.
    """
    A.check_symmetry()
    n = A.shape[0]
    Z = probes_for(A, "gaussian", 3, seeded(generator))
    Z = Z / torch.linalg.vector_norm(Z, dim=0)
    space, spent = KrylovSpace(A, Z[:, :1], _NORM_STEPS), 0
    while not space.full:
        spent += space.expand()
    theta, S, residuals = space.ritz()
    top = int(theta.abs().argmax())
    dominant = A.ranks.whole(space.rotate(S[:, [top]]), n)[0]
    # The residual bounds how far above the Ritz value an eigenvalue may lie.
    norm = float(theta[top].abs() + residuals[top])
    require_scale(norm, A.dtype)

    X = torch.stack([Z[:, 1], Z[:, 2], dominant], 1)
    product = A.matmat(X).double()
    defect = abs(float(X[:, 0].double() @ product[:, 1] - X[:, 1].double() @ product[:, 0]))
    spent += 3
    measured = 4 * (n / 2) ** 0.5 * defect
    reference = A.in_float64()
    if reference is not A:
        error = product - reference.matmat(X.double())
        spent += 3
        measured = max(measured, 4 * float(torch.linalg.vector_norm(error, dim=0).max()))
        floor, source = max(measured, A.unit_roundoff * norm), "compared with float64"
    else:
        floor = max(measured, n * A.unit_roundoff * norm)
        source = f"{A.dtype} round-off and symmetry defect"
    floor += A.defect * norm
    return Noise(floor, norm, defect, source.replace("torch.", ""), spent)
