"""The answer to "how many directions go down?": the count, its interval and its resolution."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from hvpspec.errors import InputError
from hvpspec.linalg.dense import require_tau
from hvpspec.linalg.operator import IndexBound, PointFacts
from hvpspec.results import Drawn, Result, Row, Subject, number, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: What is said of the products of each method.
_HOW = {
    "exact": "then all eigenvalues",
    "inertia": "then inertia by LDLᵀ",
    "certified": "by which directions were harvested and the rest bounded",
    "quadrature": "of stochastic Lanczos quadrature",
    "filtered": "of a damped Chebyshev filter",
}


#: Relative decreases of the loss below which a point counts as critical, and as nearly so. The
#: first is the round-off of a loss that is summed in float64 over many examples.
CRITICAL_BELOW = 1e-12
NEARLY_CRITICAL_BELOW = 1e-6


@dataclass(frozen=True, eq=False, repr=False)
class IndexCurve(Drawn):
    """The number of eigenvalues below ``-tau`` as a function of ``tau``.

    Attributes:
        taus: ascending, shape (k,).
        counts: number of eigenvalues below ``-taus``, shape (k,).
        noise_floor: counts at a smaller tau count round-off.
    """

    taus: Tensor
    counts: Tensor
    noise_floor: float

    def _draw(self, ax: Axes | None) -> Figure:
        from hvpspec.plotting import plot_line

        x, y = "resolution τ", "number of eigenvalues λ < −τ"
        return plot_line(self.taus, self.counts, (self.counts,) * 2, x, y, log=True, ax=ax)


@dataclass(frozen=True, repr=False)
class Rung(Result):
    """The index at one resolution of a ladder.

    Attributes:
        tau: the resolution, in units of the eigenvalues.
        lower: at least this many eigenvalues lie below ``-tau``, with the result's confidence.
        upper: at most this many do, with the result's confidence.
        estimate: the best guess at their number.
    """

    tau: float
    lower: int
    upper: int
    estimate: float

    @property
    def index(self) -> int | None:
        """The number, None where there is only an interval."""
        return self.lower if self.lower == self.upper else None


@dataclass(frozen=True, eq=False, repr=False)
class IndexResult(Drawn):
    """How many directions go down, at a resolution.

    Attributes:
        ladder: the answers at all resolutions asked for, in descending order of tau; the last is
            this result's own.
        method: which one counted: "exact", "inertia", "certified", "quadrature" or "filtered". The
            intervals of the last are error bars and prove nothing.
        confidence: probability that an interval holds (1 for exact methods), for each tau.
        noise_floor: bound on the error of an eigenvalue, of which the part from the assembly is
            measured and doubled for safety; signs below it mean nothing.
        norm: spectral norm of the matrix, to a few per cent for matrix-free methods.
        dim: size n of the matrix.
        num_matvecs: matrix-vector products spent.
        facts: loss, gradient norm and structural bound at the point, where the operator knows them.
        positive: number of eigenvalues above ``tau``, None for matrix-free methods.
        eigenvalues: all of them in ascending order, float64, shape (n,); None if not computed.
        resolution: eigenvalues this near to ``-tau`` may be counted or not: the width of a filter,
            0 for all other methods.
    """

    ladder: tuple[Rung, ...]
    method: str
    confidence: float
    noise_floor: float
    norm: float
    dim: int
    num_matvecs: int
    facts: PointFacts
    positive: int | None = None
    eigenvalues: Tensor | None = None
    resolution: float = 0.0

    _FORMAT: ClassVar[str] = "hvpspec-index"

    @property
    def tau(self) -> float:
        """The resolution, in units of the eigenvalues."""
        return self.ladder[-1].tau

    @property
    def lower(self) -> int:
        """At least this many eigenvalues lie below ``-tau``."""
        return self.ladder[-1].lower

    @property
    def upper(self) -> int:
        """At most this many eigenvalues lie below ``-tau``."""
        return self.ladder[-1].upper

    @property
    def interval(self) -> tuple[int, int]:
        """Between these two numbers lies the index, ends included."""
        return self.lower, self.upper

    @property
    def estimate(self) -> float:
        """The best guess at the index."""
        return self.ladder[-1].estimate

    @property
    def index(self) -> int | None:
        """The number of eigenvalues below ``-tau``, None where only an interval is known."""
        return None if self.method in ("quadrature", "filtered") else self.ladder[-1].index

    @property
    def certified(self) -> bool:
        """Whether the index is known at the stated confidence, and is that of a Hessian."""
        return self.index is not None and self.facts.certain

    @property
    def nullity(self) -> int | None:
        """Number of eigenvalues within ``[-tau, tau]``, None for matrix-free methods."""
        # The estimate of a method that has the matrix is its count.
        return None if self.positive is None else self.dim - int(self.estimate) - self.positive

    @property
    def raw_count(self) -> int | None:
        """Number of computed eigenvalues below 0, most of which may be round-off."""
        return None if self.eigenvalues is None else int((self.eigenvalues < 0).sum())

    @property
    def loss(self) -> float | None:
        """The function's value at the point, where the operator knows it."""
        return self.facts.loss

    @property
    def gradient_norm(self) -> float | None:
        """Norm of the gradient at the point, where the operator knows it."""
        return self.facts.gradient_norm

    @property
    def bound(self) -> IndexBound | None:
        """The bound on the index from the network's structure, where the operator proves one."""
        return self.facts.index_bound

    def curve(self, taus: Tensor | None = None) -> IndexCurve:
        """Count the negative eigenvalues at many resolutions.

        Args:
            taus: resolutions of at least 0, shape (k,); None for 400, evenly spaced in the
                logarithm, from a thousandth of the noise floor to the spectral norm.

        Returns:
            The curve, in ascending order of tau.

        Raises:
            InputError: this result holds no eigenvalues, or a tau is negative.
        """
        if self.eigenvalues is None:
            raise InputError(
                f"method {self.method!r} computes no eigenvalues; use method='exact' for the curve"
            )
        if taus is None:
            # The zero matrix has neither norm nor noise; any positive range shows its constant
            # curve.
            low = math.log10(1e-3 * self.noise_floor) if self.norm else -3
            high = math.log10(self.norm or 1.0)
            taus = torch.logspace(low, high, 400, dtype=torch.float64)
        taus = taus.double().sort().values
        require_tau(float(taus[0]))
        counts = torch.searchsorted(self.eigenvalues, -taus)
        return IndexCurve(taus, counts, self.noise_floor)

    def _draw(self, ax: Axes | None) -> Figure:
        from hvpspec.plotting import plot_index_curve

        return plot_index_curve(self, ax=ax)

    def rows(self, subject: Subject | None = None) -> list[Row]:
        """The lines of the table, each a label, a value and what it means."""
        facts, rows = self.facts, [self._headline(), *self._ladder_rows()]
        if self.positive is not None:
            rows.append(("nullity", f"{self.nullity:,}", "eigenvalues within ±τ"))
            rows.append(("positive", f"{self.positive:,}", "eigenvalues above τ"))
            rows.append(("raw count", *self._raw_count_text()))
        if self.confidence < 1:
            meaning = "probability that what is said of a τ holds, for each τ"
            if self.method == "filtered":
                meaning = "error bars at each τ, no proof"
            rows.append(("confidence", f"{self.confidence:.10g}", meaning))
        if self.resolution:
            meaning = "eigenvalues this near to −τ may be counted or not"
            rows.append(("resolution", number(self.resolution), meaning))
        floor = "error of an eigenvalue; no sign below it"
        rows.append(("noise floor", number(self.noise_floor), floor))
        none = "none", "the network's structure gives none that is certain"
        bound = (f"{self.bound.upper:,}", self.bound.reason) if self.bound else none
        rows.append(("upper bound", *bound))
        if facts.loss is not None and facts.gradient_norm is not None:
            l2 = f" + {subject.l2:g} ‖θ‖²" if subject and subject.l2 else ""
            rows.append(("loss f", f"{facts.loss:.5g}", subject.loss + l2 if subject else ""))
            sentence = describe_gradient(facts.gradient_norm, self.norm, facts.loss)
            rows.append(("‖∇f‖", number(facts.gradient_norm), sentence))
        if self.eigenvalues is None:
            meaning = "largest |λ|, estimated; the others not computed"
            rows.append(("‖H‖", number(self.norm), meaning))
        else:
            rows.append(("λ min", number(float(self.eigenvalues[0])), "smallest eigenvalue"))
            rows.append(("λ max", number(float(self.eigenvalues[-1])), "largest eigenvalue"))
        how = f"matrix-vector products, {_HOW[self.method]}"
        return [*rows, ("products", f"{self.num_matvecs:,}", how)]

    @property
    def _notes(self) -> tuple[str, ...]:
        return self.facts.notes

    def _title(self) -> str:
        return f"matrix of size {self.dim:,}"

    def _brief(self) -> dict[str, object]:
        count = {"index": self.index} if self.index is not None else {"interval": self.interval}
        names = ("tau", "certified", "confidence", "method", "noise_floor", "dim", "num_matvecs")
        return {**count, **{name: getattr(self, name) for name in names}}

    def _content(self) -> dict[str, Any]:
        facts, values = self.facts, self.eigenvalues
        decrease, sentence = None, None
        if facts.gradient_norm is not None and facts.loss is not None:
            decrease = plain(relative_decrease(facts.gradient_norm, self.norm, facts.loss))
            sentence = describe_gradient(facts.gradient_norm, self.norm, facts.loss)
        names = (
            *("index", "lower", "upper", "estimate", "tau", "resolution", "noise_floor"),
            *("certified", "confidence", "method", "num_matvecs", "dim", "raw_count", "nullity"),
            *("positive", "norm", "loss", "gradient_norm"),
        )
        return {
            **{name: getattr(self, name) for name in names},
            "ladder": [
                {**asdict(rung), "index": rung.index if self._proves else None}
                for rung in self.ladder
            ],
            "lambda_min": None if values is None else float(values[0]),
            "lambda_max": None if values is None else float(values[-1]),
            "relative_decrease": decrease,
            "critical_point": sentence,
            "bound": asdict(self.bound) if self.bound else None,
            "notes": list(facts.notes),
            "eigenvalues": plain(values),
        }

    @property
    def _proves(self) -> bool:
        """Whether an interval that is a point proves a count, or is only an estimate's."""
        return self.facts.certain and self.method not in ("quadrature", "filtered")

    def _headline(self) -> Row:
        """The index or the interval that is certain, and why."""
        ladder, tau = self.ladder, number(self.tau)
        count = f"[{self.lower:,}, {self.upper:,}]"
        at_floor = " (the noise floor)" if self.tau == self.noise_floor else ""
        # The finest count without a coarser one left open says how far down that goes.
        closed = next((i for i, r in enumerate(ladder) if r.index is None), len(ladder))
        if len(ladder) > 1 and self._proves and closed > 0:
            last = ladder[closed - 1]
            count = f"{last.lower:,}"
            text = f"eigenvalues below −τ, certified down to τ = {number(last.tau)}"
            text += at_floor if closed == len(ladder) else ", bracketed below it"
        elif len(ladder) > 1 and self._proves:
            text = f"an interval at τ = {tau}: not even τ = {number(ladder[0].tau)} is certified"
        elif self.index is not None:
            count, text = f"{self.index:,}", f"eigenvalues below −τ, τ = {tau}{at_floor}"
        elif not self._proves:
            what = "error bars, no proof" if self.method == "filtered" else "an interval"
            text = f"{what} at τ = {tau}; estimate {self.estimate:,.1f}"
        elif self.tau < self.noise_floor:
            text = f"an interval: τ = {tau} lies below the noise floor {number(self.noise_floor)}, "
            text += "where signs are round-off; raise τ"
        else:
            text = f"an interval: the count at τ = {tau} is not certified"
        return "index", count, text

    def _ladder_rows(self) -> list[Row]:
        """A row for each resolution, if there are several."""
        rows: list[Row] = []
        for rung in self.ladder if len(self.ladder) > 1 else ():
            count = f"[{rung.lower:,}, {rung.upper:,}]" if rung.index is None else f"{rung.index:,}"
            if not self._proves:
                state = f"estimate {rung.estimate:,.1f}"
            elif rung.index is not None:
                state = "certified"
            elif rung.tau < self.noise_floor:
                state = "bracketed: τ lies below the noise floor"
            else:
                state = "bracketed"
            relative = f"{rung.tau / self.norm:.2g} ‖H‖ · " if self.norm else ""
            rows.append((f"  τ = {number(rung.tau)}", count, relative + state))
        return rows

    def _raw_count_text(self) -> tuple[str, str]:
        """The number of negative signs, and how many of them are round-off."""
        if self.eigenvalues is None:
            unknown = "#(λ < 0) is not known without the eigenvalues, and would be mostly round-off"
            return "–", unknown
        raw = int((self.eigenvalues < 0).sum())
        meaningless = raw - int((self.eigenvalues < -self.noise_floor).sum())
        text = "#(λ < 0), none of it round-off"
        if meaningless:
            mostly = "mostly" if 2 * meaningless > raw else "partly"
            text = f"#(λ < 0), {mostly} round-off: "
            text += f"counts signs below the noise floor ({meaningless:,})"
        return f"{raw:,}", text


def relative_decrease(gradient_norm: float, norm: float, loss: float) -> float:
    """How far a point is from critical, on a scale without units.

    A gradient of norm g says nothing by itself: the loss may be multiplied and the parameters
    stretched. A step of length ``g / ||H||`` against the gradient lowers the quadratic model of the
    loss by at least ``g^2 / (2 ||H||)``. Divided by ``|f|`` this has no units: it is the fraction
    of the loss that one safe step still takes away.

    Args:
        gradient_norm: g, the Euclidean norm of the gradient.
        norm: ``||H||``, the spectral norm of the Hessian.
        loss: f.

    Returns:
        ``g^2 / (2 ||H|| |f|)``: 0 at an exact critical point, and infinity where a gradient is left
        but the Hessian or the loss is 0, so that nothing bounds the decrease.

    >>> relative_decrease(0.5, 2.0, 0.25)
    0.25
    """
    if gradient_norm == 0:
        return 0.0
    scale = 2 * norm * abs(loss)
    # Divide twice: the square of a small gradient may underflow.
    return gradient_norm / scale * gradient_norm if scale > 0 else math.inf


def describe_gradient(gradient_norm: float, norm: float, loss: float) -> str:
    """Say whether a point is critical, so that its index is that of a saddle.

    The arguments, and the measure, are those of :func:`relative_decrease`.

    >>> describe_gradient(0.0, 5.0, 0.2)
    'a critical point to working precision'
    """
    decrease = relative_decrease(gradient_norm, norm, loss)
    if decrease < CRITICAL_BELOW:
        return "a critical point to working precision"
    measure = f"(‖∇f‖² / 2‖H‖|f| = {decrease:.2g})"
    if decrease < NEARLY_CRITICAL_BELOW:
        return f"nearly a critical point {measure}"
    return f"not a critical point: the index describes the curvature here, not a saddle {measure}"
