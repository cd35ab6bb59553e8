"""Draw the figure of the page "Critical points: the proof", on a function of two weights.

Run it with ``python docs/figures/critical.py [FOLDER]``; the picture goes to FOLDER (default: out).
"""

import sys
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from torch import Tensor

from hvpspec.landscape import CriticalPoint, FunctionLandscape, certify, critical_points
from hvpspec.plotting import save_figure

LAM = 0.1
# |D^3 f[v, v, v]| = 6 |v_1 v_2| |a v_2 + b v_1| <= 3 ||(a, b)||, at most 6 where the norm is 2.
K = 6.0
BLUE, ORANGE, GREEN, GREY = "#1f6fb4", "#d9730d", "#2e8b57", "0.45"


def landscape() -> FunctionLandscape:
    """``(a b - 1)^2 / 2 + lam (a^2 + b^2)``: two linear layers of one weight, and one example.

    >>> f = landscape()
    >>> round(f.value(torch.zeros(2, dtype=f.dtype)), 12)
    0.5
    """
    return FunctionLandscape(2, lambda p: (p[0] * p[1] - 1) ** 2 / 2 + LAM * p @ p)


def newton(f: FunctionLandscape, theta: Tensor, num_steps: int) -> list[Tensor]:
    """The points that Newton's method visits."""
    points = [theta]
    for _ in range(num_steps):
        step = torch.linalg.solve(f.hessian(theta).to_dense(), f.gradient(theta))
        theta = theta - step
        points.append(theta)
    return points


def draw_map(
    figure: Figure, f: FunctionLandscape, points: tuple[CriticalPoint, ...], way: list[Tensor]
) -> None:
    """Contours, the critical points by kind, and the discs in which each is alone."""
    ax = figure.add_subplot(1, 2, 1)
    line = torch.linspace(-1.7, 1.7, 161, dtype=f.dtype)
    b, a = torch.meshgrid(line, line, indexing="ij")
    values = f.values(torch.stack([a.flatten(), b.flatten()], dim=1)).view_as(a)
    levels = [0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 1, 1.5, 2.5, 4, 6]
    lines = ax.contour(line, line, values, levels=levels, colors=GREY, linewidths=0.7)
    ax.clabel(lines, levels=[0.3, 0.5, 1, 2.5], fontsize=7)
    for point in points:
        minimum = point.kind == "minimum"
        color = GREEN if minimum else ORANGE
        x, y = point.theta.tolist()
        ax.add_patch(Circle((x, y), point.isolation, color=color, alpha=0.25, lw=0))
        ax.plot(x, y, "o" if minimum else "X", color=color, ms=6)
        ax.annotate(
            f"{point.kind}\n$f = {point.value:.2f}$",
            (x, y),
            (-12, 20) if x <= 0 else (2, -42),
            textcoords="offset points",
            fontsize=8,
            color=color,
            bbox={"fc": "white", "ec": "none", "alpha": 0.8, "pad": 1},
        )
    ax.plot(*torch.stack(way).T.tolist(), ".-", color=BLUE, lw=1, ms=5)
    x, y = way[0].tolist()
    ax.annotate("Newton's method", (x, y), (-58, 14), textcoords="offset points", fontsize=8,
                color=BLUE)  # fmt: skip
    ax.set(
        aspect="equal",
        xlabel="weight $a$",
        ylabel="weight $b$",
        title="Where each critical point is alone",
    )


def draw_proof(figure: Figure, f: FunctionLandscape, way: list[Tensor]) -> None:
    """Along Newton's steps: h, the proved radius and the true distance."""
    ax = figure.add_subplot(1, 2, 2)
    proofs = [certify(f, theta, lipschitz=K) for theta in way]
    true = (1 - 2 * LAM) ** 0.5 * torch.ones(2, dtype=f.dtype)
    steps = range(len(way))
    for k, proof in enumerate(proofs):
        distance = float(torch.linalg.vector_norm(way[k] - true))
        print(
            f"step {k}: h {proof.h:.2e}, radius {proof.radius:.2e}, distance {distance:.2e},"
            f" isolation {proof.isolation:.3f}, {proof.kind}"
        )
    ax.plot(steps, [p.h for p in proofs], "s-", color=ORANGE, ms=4, label="$h$")
    proved = [k for k in steps if proofs[k].h <= 0.5]
    ax.plot(proved, [proofs[k].isolation for k in proved], "^-", color=GREY, ms=4,
            label="isolation")  # fmt: skip
    ax.plot(proved, [proofs[k].radius for k in proved], "o-", color=GREEN, ms=4,
            label="radius $r$: the critical point is this near")  # fmt: skip
    # The last one is 0 after rounding, which a logarithmic axis cannot show.
    distances = [float(torch.linalg.vector_norm(theta - true)) for theta in way]
    shown = [k for k in steps if distances[k] > 0]
    ax.plot(shown, [distances[k] for k in shown], "x--", color=BLUE, ms=5,
            label="true distance")  # fmt: skip
    ax.axhline(0.5, color="black", lw=0.8)
    ax.annotate("$h \\leq 1/2$ proves", (len(way) - 1, 0.7), ha="right", fontsize=8)
    ax.set(
        yscale="log",
        ylim=(1e-17, 1e3),
        xlabel="Newton step",
        title="What is proved on the way",
        xticks=list(steps),
    )
    ax.legend(fontsize=7.5, loc="lower left", framealpha=1)


def main(folder: Path) -> None:
    """Draw both panels and write the picture."""
    folder.mkdir(parents=True, exist_ok=True)
    matplotlib.use("Agg")
    f = landscape()
    generator = torch.Generator().manual_seed(0)
    starts = torch.randn(30, 2, generator=generator, dtype=f.dtype)
    points = critical_points(f, starts, lipschitz=K)
    for point in points:
        print(f"{point.kind}: f {point.value:.6f}, isolation {point.isolation:.3f}")
    way = newton(f, torch.tensor([0.8, 1.15], dtype=f.dtype), 5)
    figure = Figure(figsize=(9.0, 4.2), layout="constrained")
    draw_map(figure, f, points, way)
    draw_proof(figure, f, way)
    save_figure(figure, folder / "critical.png")
    print(f"wrote {folder / 'critical.png'}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "out"))
