"""Draw the figure of the page "The certificate", on a spectrum that is known.

Run it with ``python docs/figures/certificate.py [FOLDER]``; the picture goes to FOLDER (default:
out).
"""

import sys
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from scipy.stats import chi2
from torch import Tensor

import hvpspec
from hvpspec.linalg import LanczosRun, draw_probes, lanczos, mass_below
from hvpspec.plotting import save_figure

TAU = 1e-3
CONFIDENCE = 0.99
BLUE, ORANGE, GREEN, GREY = "#1f6fb4", "#d9730d", "#2e8b57", "0.45"


def spectrum() -> Tensor:
    """2,000 eigenvalues: 40 below -0.0019, 1,860 in a bulk around 0, 100 above 0.0019.

    >>> values = spectrum()
    >>> len(values), int((values < -TAU).sum()), int((values > TAU).sum())
    (2000, 40, 100)
    """
    generator = torch.Generator().manual_seed(0)
    bulk = 2e-4 * torch.randn(1860, generator=generator, dtype=torch.float64)
    negative = -torch.logspace(-2.7, -1, 40, dtype=torch.float64)
    positive = torch.logspace(-2.7, 0, 100, dtype=torch.float64)
    return torch.cat([negative, bulk, positive])


def diagonal_operator(values: Tensor) -> hvpspec.FunctionOperator:
    """A diagonal matrix seen through products; to Gaussian probes, every basis is as good."""
    return hvpspec.FunctionOperator(len(values), lambda v: values * v)


def brackets(values: Tensor, kept: Tensor, num_steps: int) -> tuple[Tensor, Tensor, float]:
    """Bounds on a probe's mass below -TAU after each step, and the mass itself.

    ``kept`` marks the eigenvectors that were not taken out; shapes (num_steps,) twice.
    """
    A = diagonal_operator(values)
    z = draw_probes("gaussian", len(values), 1, torch.Generator().manual_seed(2))
    z = torch.where(kept[:, None], z, 0.0)
    (run,) = lanczos(A, z, num_steps)
    prefixes = [
        LanczosRun(run.alphas[:m], run.betas[:m], run.norm, exhausted=False)
        for m in range(1, len(run.alphas) + 1)
    ]
    low, high = torch.tensor([mass_below(part, -TAU) for part in prefixes]).T * run.norm**2
    return low, high, float(z[values < -TAU].square().sum())


def draw_brackets(figure: Figure, position: int, values: Tensor) -> None:
    """The bracket of one probe's mass, before and after deflation."""
    ax = figure.add_subplot(1, 2, position)
    everything = torch.ones_like(values, dtype=torch.bool)
    cases = [
        (everything, BLUE, "nothing taken out"),
        (values > -TAU, ORANGE, "all 40 below $-\\tau$ taken out"),
        ((values > -TAU) & (values < 1e-2), GREEN, "also the 74 above $10\\,\\tau$ taken out"),
    ]
    for kept, color, label in cases:
        low, high, mass = brackets(values, kept, 160)
        steps = range(1, len(high) + 1)
        ax.plot(steps, high, color=color, label=f"$U$, {label}")
        if mass > 0:
            ax.plot(steps, low, color=color, ls="--", label="$L$, nothing taken out")
            ax.axhline(mass, color=color, lw=0.8, ls=":")
            ax.annotate(
                f"$X = {mass:.1f}$",
                (158, mass / 2.2),
                ha="right",
                va="top",
                color=color,
                fontsize=8,
            )
    threshold = float(chi2.ppf((1 - CONFIDENCE) / 2, df=1))
    ax.axhline(threshold, color="black", lw=0.8)
    ax.annotate(
        f"below {threshold:.1e}: certified",
        (158, threshold * 1.6),
        ha="right",
        fontsize=8,
    )
    ax.set(
        yscale="log",
        ylim=(1e-10, 1e8),
        xlim=(0, 160),
        xlabel="Lanczos steps from one probe",
        ylabel="mass of the probe below $-\\tau$",
        title="What a probe says",
    )
    ax.legend(fontsize=7.5, loc="upper right", framealpha=1)


def draw_loop(figure: Figure, position: int, values: Tensor) -> None:
    """The interval for the count over the products spent."""
    ax = figure.add_subplot(1, 2, position)
    A = diagonal_operator(values)
    history: list[tuple[int, int, int]] = []
    before = 0

    def watch(rung: hvpspec.Rung) -> None:
        history.append((A.num_matvecs - before, rung.lower, rung.upper))

    result = hvpspec.index(A, TAU, method="certified", confidence=CONFIDENCE, watch=watch)
    spent, lower, upper = zip(*history, strict=True)
    ax.fill_between(
        spent, [max(low, 0.5) for low in lower], upper, step="post", color=GREEN, alpha=0.25, lw=0
    )
    ax.step(spent, upper, where="post", color=GREEN, label="certified: upper")
    ax.step(spent, lower, where="post", color=GREEN, ls="--", label="certified: lower")
    ax.plot(spent[-1], result.lower, "o", color=GREEN)
    print(f"certified: {result.index} in {result.num_matvecs} products")

    num_steps = result.num_matvecs // 10
    plain = hvpspec.index(
        A, TAU, method="quadrature", confidence=CONFIDENCE, num_probes=10, num_steps=num_steps
    )
    print(
        f"quadrature: [{plain.lower}, {plain.upper}] around {plain.estimate:.1f}"
        f" in {plain.num_matvecs} products"
    )
    ax.errorbar(
        [10 * num_steps * 1.06],
        [plain.estimate],
        [[plain.estimate - plain.lower], [plain.upper - plain.estimate]],
        color=ORANGE,
        fmt="s",
        ms=4,
        capsize=4,
        label=f"quadrature, 10 probes of {num_steps} steps",
    )
    truth = int((values < -TAU).sum())
    ax.axhline(truth, color="black", lw=0.8, ls=":")
    ax.annotate(
        f"certified: {result.index}",
        (spent[-1], truth),
        (-4, -26),
        textcoords="offset points",
        ha="right",
        fontsize=8,
    )
    ax.set(
        yscale="log",
        ylim=(0.8, 3e5),
        xlim=(0, 1.13 * 10 * num_steps),
        xlabel="products",
        ylabel="eigenvalues below $-\\tau$",
        title="What the loop knows",
    )
    ax.legend(fontsize=7.5, loc="upper right", framealpha=1)


def main(folder: Path) -> None:
    """Draw both panels and write the picture."""
    folder.mkdir(parents=True, exist_ok=True)
    matplotlib.use("Agg")
    values = spectrum()
    figure = Figure(figsize=(9.0, 4.2), layout="constrained")
    draw_brackets(figure, 1, values)
    draw_loop(figure, 2, values)
    save_figure(figure, folder / "certificate.png")
    print(f"wrote {folder / 'certificate.png'}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "out"))
