"""Linear regression, where everything is known: f(w) = ‖Xw − y‖² + λ‖w‖².

Its Hessian is 2 XᵀX + 2 λ I, where the paper's Example 1 and its regularised objective leave out
the factor 2. It has no negative eigenvalue, and as many zeros as columns that X lacks in rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor, nn

from examples.paper.points import images_of
from examples.paper.results import Record
from examples.paper.tables import Table
from hvpspec import HessianOperator, index, zoo


@dataclass(frozen=True, kw_only=True)
class LinearRun:
    """One regression.

    Attributes:
        data: ``gaussian``, or images whose pixels are the columns of X.
        examples: rows of X.
        features: columns of X.
        rank: of the factors that X is a product of; None for images.
        l2: λ.
        seed: of X and y.
    """

    data: str
    examples: int
    features: int
    rank: int | None
    l2: float = 0.0
    seed: int = 0


#: With full rank and without, with more unknowns than equations, regularised, and on images.
LINEAR_RUNS = (
    LinearRun(data="gaussian", examples=200, features=40, rank=40),
    LinearRun(data="gaussian", examples=200, features=40, rank=25),
    LinearRun(data="gaussian", examples=200, features=40, rank=25, l2=0.1),
    LinearRun(data="gaussian", examples=20, features=40, rank=20),
    LinearRun(data="mnist-sample", examples=2000, features=784, rank=None),
    LinearRun(data="mnist-sample", examples=2000, features=784, rank=None, l2=0.1),
)


def measure_linear(run: LinearRun) -> Record:
    """Count at the least-squares solution, and hold the Hessian against both formulas.

    ``relative_error`` is ‖H − (2 XᵀX + 2 λ I)‖ / ‖H‖, ``relative_error_without_2`` the same with
    XᵀX + λ I, in the Frobenius norm.

    Args:
        run: which regression.
    """
    X, y = _problem(run)
    model = zoo.linear(run.features, bias=False).double()
    solution, rank = _least_squares(X, y, run.l2)
    model.load_state_dict({"output.weight": solution.T})
    loss = nn.MSELoss(reduction="sum")
    # One named engine, so that a run gives the same bits again.
    hessian = HessianOperator(model, loss, (X, y), l2=run.l2, engine="double-backward")
    result = index(hessian, method="exact")
    matrix = hessian.to_dense()
    gram = X.T @ X + run.l2 * torch.eye(run.features, dtype=X.dtype)
    size = torch.linalg.matrix_norm(matrix)
    return {
        "method": result.method,
        "dtype": "float64",
        "rank_of_X": rank,
        "tau": result.tau,
        "index": result.index,
        "raw_count": result.raw_count,
        "nullity": result.nullity,
        "expected_nullity": 0 if run.l2 else run.features - rank,
        "grad_norm": result.gradient_norm,
        "loss": result.loss,
        "norm": result.norm,
        "bound": result.bound.upper if result.bound else None,
        "relative_error": float(torch.linalg.matrix_norm(matrix - 2 * gram) / size),
        "relative_error_without_2": float(torch.linalg.matrix_norm(matrix - gram) / size),
    }


def linear_tables(lines: pd.DataFrame) -> list[Table]:
    """Show the regressions in a table.

    Args:
        lines: as `measure_linear` makes them.
    """
    frame = pd.DataFrame(
        {
            "X": lines["data"],
            "size": [
                f"{rows:,} × {columns}"
                for rows, columns in zip(lines["examples"], lines["features"], strict=True)
            ],
            "rank": lines["rank_of_X"].map(str),
            "λ": lines["l2"].map("{:g}".format),
            "index": lines["index"].map(str),
            "raw": lines["raw_count"].map(str),
            "nullity": lines["nullity"].map(str),
            "n − rank": lines["expected_nullity"].map(str),
            "‖∇f‖ / ‖H‖": (lines["grad_norm"] / lines["norm"]).map("{:.1e}".format),
            "H against 2 XᵀX + 2 λI": lines["relative_error"].map("{:.1e}".format),
            "H against XᵀX + λI": lines["relative_error_without_2"].map("{:.3f}".format),
        }
    )
    return [
        Table(
            "Linear regression",
            frame,
            2,
            "f(w) = ‖Xw − y‖² + λ‖w‖² at its least-squares solution. Every critical point is a"
            " minimum: the index is 0, and the nullity n − rank X, or 0 with λ > 0. The last two"
            " columns are relative differences: the paper writes XᵀX and λI, without the factor 2,"
            " which changes no sign but doubles every eigenvalue.",
        )
    ]


def _problem(run: LinearRun) -> tuple[Tensor, Tensor]:
    """X and y in float64, shapes (examples, features) and (examples, 1)."""
    if run.rank is None:
        inputs, targets = images_of(run.data, None).subset(run.examples).tensors
        return inputs.flatten(1).double(), targets.double().unsqueeze(1)
    generator = torch.Generator().manual_seed(run.seed)
    left = torch.randn(run.examples, run.rank, generator=generator, dtype=torch.float64)
    right = torch.randn(run.rank, run.features, generator=generator, dtype=torch.float64)
    y = torch.randn(run.examples, 1, generator=generator, dtype=torch.float64)
    return left @ right, y


def _least_squares(X: Tensor, y: Tensor, l2: float) -> tuple[Tensor, int]:
    """The minimiser of ‖Xw − y‖² + λ‖w‖² of least norm, (features, 1), and the rank of X.

    Singular values below the round-off of the decomposition count as zero, as in
    `torch.linalg.matrix_rank`.
    """
    U, S, V = torch.linalg.svd(X, full_matrices=False)
    smallest = max(X.shape) * torch.finfo(X.dtype).eps * S[0]
    rank = int((smallest < S).sum())
    U, S, V = U[:, :rank], S[:rank], V[:rank]
    return V.T @ ((S / (S**2 + l2))[:, None] * (U.T @ y)), rank
