"""What it takes to walk on a landscape: products at many points, and ways to certified minima."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import scipy.optimize
import torch
import typer
from torch import Tensor, nn

from benchmarks.measuring import Times, table, write
from benchmarks.networks import problem
from hvpspec.errors import NonFiniteError
from hvpspec.landscape import NetworkLandscape, certify, critical_point
from hvpspec.zoo import Dataset, build_network, load_data

app = typer.Typer(help=__doc__, add_completion=False)
Out = Annotated[Path, typer.Option(help="Folder of the results.")]
Repeats = Annotated[int, typer.Option(min=1)]

SMOOTH: dict[str, dict[str, str]] = {
    "mlp2": {"activation": "tanh"},
    "mlp3": {"activation": "tanh"},
    "cnn": {"activation": "tanh", "pooling": "average"},
}


@app.command()
def points(
    out: Out = Path("out/landscape"),
    network: Annotated[list[str] | None, typer.Option(help="mlp2, cnn, gpt by default.")] = None,
    products: Annotated[int, typer.Option(min=1)] = 100,
    repeats: Repeats = 3,
) -> None:
    """Time products at as many points as there are products, against as many at one point."""
    out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for name in network or ["mlp2", "cnn", "gpt"]:
        p = problem(name)
        F = NetworkLandscape(p.model, nn.CrossEntropyLoss(), p.batches, l2=1e-3, allow_kinks=True)
        generator = torch.Generator().manual_seed(0)
        V = torch.randn(products, F.n, generator=generator, dtype=F.dtype)
        ratios, ones = [], []
        for _ in range(repeats):
            start = time.process_time()
            for v in V:
                F.hessian(F.start + 1e-3 * v).matvec(v)
            many = time.process_time() - start
            start = time.process_time()
            H = F.hessian(F.start)
            for v in V:
                H.matvec(v)
            ones.append(time.process_time() - start)
            ratios.append(many / ones[-1])
        rows.append(
            {
                "network": name,
                "products": products,
                "at one point, seconds": f"{Times(tuple(ones)).median:.3g}",
                "at as many points": f"{Times(tuple(ratios))} times",
            }
        )
        print(rows[-1], flush=True)
        write(out, "points", "float64", rows, table(rows))


def landscape(name: str, seed: int, images: int, l2: float) -> NetworkLandscape:
    """A smooth network of the paper with its initial weights, on the first images of MNIST."""
    source = "mnist-sample" if images <= 2000 else "mnist"
    data = cast("Dataset", load_data(source, subset=images))
    model = build_network(name, SMOOTH[name], seed=seed)
    return NetworkLandscape(model, nn.CrossEntropyLoss(), data.tensors, l2=l2)


@app.command()
def minima(
    out: Out = Path("out/landscape"),
    network: Annotated[list[str] | None, typer.Option(help="All three by default.")] = None,
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    images: int = 2000,
    l2: float = 1e-3,
) -> None:
    """Go from initial weights of the paper's networks, smooth, to certified minima."""
    out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for name in network or list(SMOOTH):
        for seed in range(seeds):
            F = landscape(name, seed, images, l2)
            start = time.perf_counter()
            p = critical_point(F, F.start)
            rows.append(
                {
                    "network": name,
                    "seed": seed,
                    "images": images,
                    "f": f"{p.value:.10f}",
                    "‖∇f‖": f"{p.gradient_norm:.1e}",
                    "kind": p.kind,
                    "gap": f"{p.gap:.2e}",
                    "K": f"{p.lipschitz:.1e}",
                    "h": f"{p.h:.1e}",
                    "radius": f"{p.radius:.1e}",
                    "proved": "yes" if p.certified else p.reason,
                    "gradients": p.num_gradients,
                    "products": p.num_matvecs,
                    "seconds": f"{time.perf_counter() - start:.0f}",
                }
            )
            print(rows[-1], flush=True)
            write(out, f"minima-{images}", "float64", rows, table(rows))


class Counted:
    """A landscape for SciPy and PyTorch, which counts what they spend."""

    def __init__(self, F: NetworkLandscape) -> None:
        self.F, self.gradients, self.products = F, 0, 0

    def both(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        """The function and its gradient."""
        self.gradients += 1
        value, gradient = self.F.value_and_gradient(torch.as_tensor(x))
        return value, gradient.numpy()

    def product(self, x: np.ndarray, v: np.ndarray) -> np.ndarray:
        """The Hessian at a point times a vector."""
        self.products += 1
        return self.F.hessian(torch.as_tensor(x)).matvec(torch.as_tensor(v)).numpy()


def trust_krylov(counted: Counted, theta: Tensor) -> Tensor:
    """SciPy's trust-krylov, started again where it stopped until it moves no more.

    Near the minimum it may multiply NaN; the last point before that is its end.
    """
    points = [theta.numpy()]
    for _ in range(5):
        before = points[-1]
        try:
            scipy.optimize.minimize(
                counted.both, before, jac=True, hessp=counted.product, method="trust-krylov",
                callback=lambda x: points.append(x.copy()), options={"gtol": 1e-12},
            )  # fmt: skip
        except NonFiniteError:
            break
        if np.array_equal(points[-1], before):
            break
    return torch.as_tensor(points[-1])


def torch_lbfgs(counted: Counted, theta: Tensor) -> Tensor:
    """PyTorch's L-BFGS with its line search."""
    x = theta.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [x], max_iter=20_000, history_size=30, tolerance_grad=1e-12, tolerance_change=0,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> float:
        value, gradient = counted.both(x.detach().numpy())
        x.grad = torch.as_tensor(gradient)
        return value

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return x.detach()


@app.command()
def rivals(
    out: Out = Path("out/landscape"),
    network: Annotated[list[str] | None, typer.Option(help="mlp2, cnn, gpt by default.")] = None,
    images: int = 200,
) -> None:
    """Compare the cost of a minimum with SciPy's trust-krylov and PyTorch's L-BFGS alone."""
    out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for name in network or ["mlp2", "cnn", "gpt"]:
        if name == "gpt":
            p = problem("gpt")
            F = NetworkLandscape(p.model, nn.CrossEntropyLoss(), p.batches, l2=1e-3)
        else:
            F = landscape(name, 0, images, 1e-3)
        for method in ("hvpspec", "trust-krylov", "L-BFGS"):
            counted, start = Counted(F), time.perf_counter()
            if method == "hvpspec":
                end = critical_point(F, F.start)
            else:
                walk = trust_krylov if method == "trust-krylov" else torch_lbfgs
                end = certify(F, walk(counted, F.start))
            ours = method == "hvpspec"
            rows.append(
                {
                    "network": name,
                    "method": method,
                    "f": f"{end.value:.10f}",
                    "‖∇f‖": f"{end.gradient_norm:.1e}",
                    "kind": end.kind,
                    "proved": "yes" if end.certified else end.reason,
                    "gradients": end.num_gradients if ours else counted.gradients,
                    "products": end.num_matvecs if ours else counted.products,
                    "seconds": f"{time.perf_counter() - start:.0f}",
                }
            )
            print(rows[-1], flush=True)
            write(out, "rivals", "float64", rows, table(rows))


if __name__ == "__main__":
    app()
