"""Gauss and Gauss-Radau rules from the coefficients of a Lanczos run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from scipy.linalg import eigh_tridiagonal
from torch import Tensor

from hvpspec.errors import InputError
from hvpspec.results import Drawn

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from hvpspec.linalg.krylov import LanczosRun


@dataclass(frozen=True, eq=False, repr=False)
class Rule(Drawn):
    """A quadrature rule for the spectral measure of a start vector, scaled to total mass 1.

    Attributes:
        nodes: ascending, float64, shape (m,).
        weights: non-negative, sum 1, shape (m,).
    """

    nodes: Tensor
    weights: Tensor

    def _draw(self, ax: Axes | None) -> Figure:
        from hvpspec.plotting.figures import figure_of

        figure, ax = figure_of(ax)
        ax.vlines(self.nodes, 0, self.weights)
        # Weights fall off over many orders of magnitude.
        ax.set_yscale("log")
        ax.set_xlabel("node (Ritz value)")
        ax.set_ylabel("weight")
        return figure


def gauss(run: LanczosRun) -> Rule:
    """The m-node Gauss rule: eigenvalues of T, squared first components of its eigenvectors.

    It integrates polynomials of degree up to 2m - 1 exactly (any function, if the run is
    exhausted).

    Reference:
        Golub & Meurant, Matrices, Moments and Quadrature, section 6.2.
    """
    return _rule(run.T)


def gauss_radau(run: LanczosRun, x: float) -> Rule:
    """The rule with m + 1 nodes of which one is ``x``, exact to degree 2m.

    T is extended by the residual norm ``beta`` and the entry ``x + d_m`` with
    ``(T - x I) d = beta^2 e_m``. For an exhausted run, whose Gauss rule is exact, that is returned.

    Raises:
        InputError: ``x`` is not finite.

    Reference:
        Golub & Meurant, Matrices, Moments and Quadrature, section 6.2.1.
    """
    if not math.isfinite(x):
        raise InputError(f"x must be finite, got {x}")
    m = len(run.alphas)
    if run.exhausted:
        return gauss(run)
    beta = run.betas[-1]
    # In units of the spectrum, so that squares neither overflow nor underflow at any scale.
    unit = run.alphas.abs().max() + run.betas.max()
    shifted = run.T / unit - x / unit * torch.eye(m, dtype=torch.float64)
    e_m = torch.zeros(m, dtype=torch.float64)
    e_m[-1] = (beta / unit) ** 2
    d, info = torch.linalg.solve_ex(shifted, e_m)
    # Where x is a node of the Gauss rule to round-off, d grows without limit and would drown the
    # other nodes; the Gauss rule is then the one looked for. Up to 1e7 the entry d, in units of
    # the spectrum, leaves the other nodes half of float64's digits.
    if int(info) or not bool(d[-1].abs() < 1e7):
        return gauss(run)
    extended = torch.zeros(m + 1, m + 1, dtype=torch.float64)
    extended[:m, :m] = run.T
    extended[m - 1, m] = extended[m, m - 1] = beta
    extended[m, m] = x + d[-1] * unit
    return _rule(extended)


def mass_below(run: LanczosRun, x: float) -> tuple[float, float]:
    """Bounds on the mass below ``x`` of the start vector's spectral measure, of total mass 1.

    Chebyshev, Markov and Stieltjes: the mass below x of every measure with the run's moments lies
    between the weights of the Radau rule's nodes below x without and with the prescribed node.

    Returns:
        The lower and the upper bound, equal for an exhausted run.

    Reference:
        Golub & Meurant, section 2.2.3 and 6.2.1; Krein & Nudelman, The Markov Moment Problem.
    """
    rule = gauss_radau(run, x)
    if run.exhausted:
        mass = min(1.0, float(rule.weights[rule.nodes < x].sum()))
        return mass, mass
    prescribed = int((rule.nodes - x).abs().argmin())
    lower = min(1.0, float(rule.weights[:prescribed].sum()))
    return lower, min(1.0, lower + float(rule.weights[prescribed]))


def mass_bracket(run: LanczosRun, first: float, last: float) -> tuple[float, float]:
    """Bounds on the mass below a number that lies between two others, as by :func:`mass_below`.

    The two rules are those of matrices within a small multiple of ``u ||T||`` of T. Such a change
    moves part of the weight of a node to another at the distance d, about ``u ||T|| / d`` of it. So
    where the numbers lie between close nodes and the bracket is narrow, its ends may cross.

    Returns:
        The lower and the upper bound, in this order whatever round-off does.
    """
    low, high = mass_below(run, first)[0], mass_below(run, last)[1]
    return min(low, high), max(low, high)


def _rule(T: Tensor) -> Rule:
    """Nodes and weights of the rule that belongs to a tridiagonal matrix."""
    nodes, vectors = eigh_tridiagonal(
        T.diagonal().numpy(), T.diagonal(1).numpy(), lapack_driver="stevd"
    )
    return Rule(torch.from_numpy(nodes), torch.from_numpy(vectors[0] ** 2))
