"""``hvpspec critical`` and ``hvpspec lower-index``: true critical points, and ways down to them."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from hvpspec.cli.options import KEPT, PICTURE, WRITTEN, JsonFile, ProbeSeed, of_method, of_output
from hvpspec.cli.problem import LoadProblem, Problem, draw, on_problem, show
from hvpspec.errors import InputError, first_line
from hvpspec.files import make_folder, write_atomically
from hvpspec.progress import bar
from hvpspec.results import Row, closing_rows, plain, text_table

if TYPE_CHECKING:
    from torch import Tensor

    from hvpspec.landscape import CriticalPoint, NetworkLandscape

# The file in the folder of --checkpoint.
_KEPT_POINT = "point.safetensors"

# Each point is multiplied at once and left, so that no engine is chosen and no product kept.
_on_problem = partial(
    on_problem, without=("engine", "pseudo_gradient", "checkpoint", "checkpoint_every")
)

Lipschitz = Annotated[
    Literal["proved", "estimated"],
    of_method(
        "--lipschitz",
        "proved: prove a Lipschitz constant of the Hessian, or say why that cannot be done."
        " estimated: estimate it, and prove nothing.",
    ),
]
AllowKinks = Annotated[
    bool,
    of_method(
        "--allow-kinks",
        "Go on with ReLU and other functions that are not twice differentiable; then nothing is"
        " certified.",
    ),
]
MaxGradients = Annotated[int, of_method("--max-gradients", "Stop after so many gradients.", min=1)]
PointFolder = Annotated[
    Path | None,
    of_output(
        "--checkpoint",
        "Keep the last point here, so that the same command can go on from it.",
        metavar="DIR",
    ),
    KEPT,
]
PointEvery = Annotated[
    float, of_output("--checkpoint-every", "Seconds between two points there.", min=0)
]
PointFile = Annotated[
    Path | None,
    of_output("--out", "Write the point as a checkpoint, in float64.", metavar="FILE.pt"),
    WRITTEN,
]


@_on_problem
def critical(
    load: LoadProblem,
    target: Annotated[
        str,
        of_method(
            "--target",
            "minimum: go down. nearest: follow Newton's method. A number: find a saddle of that"
            " index.",
            metavar="NAME",
        ),
    ] = "minimum",
    lipschitz: Lipschitz = "proved",
    allow_kinks: AllowKinks = False,
    max_gradients: MaxGradients = 20_000,
    seed: ProbeSeed = None,
    json_file: JsonFile = None,
    out: PointFile = None,
    checkpoint: PointFolder = None,
    checkpoint_every: PointEvery = 60.0,
) -> None:
    """Go to a critical point of the loss with its l2 term, and prove that it is there."""
    wanted: Any = int(target) if target.isdecimal() else target
    problem = load()
    import torch

    from hvpspec.landscape import critical_point
    from hvpspec.landscape.critical import require_target

    F, start = _landscape(problem, allow_kinks), time.perf_counter()
    require_target(wanted, F.n)
    with _Keeper(problem, F, f"target {target}", out, checkpoint, checkpoint_every) as keeper:
        point = critical_point(
            F,
            keeper.start,
            target=wanted,
            lipschitz=lipschitz,
            max_gradients=max_gradients,
            generator=torch.Generator().manual_seed(seed or 0),
            observer=keeper,
        )
    loss = _of_the_loss(F, point)
    seconds = time.perf_counter() - start
    rows = [*point.rows(), *loss.rows, *closing_rows(seconds, problem.subject.notes)]
    content = {
        **point.to_dict(subject=problem.subject, seconds=seconds),
        "loss": plain(loss),
    }
    show(text_table(problem.subject.title, rows), json_file, content)
    save_point(problem, F, point.theta, out)


@_on_problem
def lower_index(
    load: LoadProblem,
    order: Annotated[
        int,
        of_method(
            "--order",
            "2 ends where no eigenvalue is negative; 3 also leaves such a point where a third"
            " derivative shows the way down.",
            min=2,
            max=3,
        ),
    ] = 2,
    tau: Annotated[
        list[float] | None,
        of_method(
            "--tau", "Count eigenvalues below -TAU; repeatable.", "1e-2, 1e-4, 1e-6", metavar="TAU"
        ),
    ] = None,
    lipschitz: Lipschitz = "proved",
    allow_kinks: AllowKinks = False,
    max_gradients: MaxGradients = 20_000,
    seed: ProbeSeed = None,
    json_file: JsonFile = None,
    out: PointFile = None,
    checkpoint: PointFolder = None,
    checkpoint_every: PointEvery = 60.0,
    picture: Annotated[
        Path | None,
        of_output("--plot", "Draw f and the index on the way: .png, .pdf or .svg.", metavar="FILE"),
        PICTURE,
    ] = None,
) -> None:
    """Go down from a checkpoint until no eigenvalue of the Hessian is negative."""
    problem = load()
    import torch

    from hvpspec.landscape import lower_index

    F, start = _landscape(problem, allow_kinks), time.perf_counter()
    with _Keeper(problem, F, f"order {order}", out, checkpoint, checkpoint_every) as keeper:
        way = lower_index(
            F,
            keeper.start,
            order=3 if order == 3 else 2,
            taus=tuple(tau or (1e-2, 1e-4, 1e-6)),
            lipschitz=lipschitz,
            max_gradients=max_gradients,
            generator=torch.Generator().manual_seed(seed or 0),
            observer=keeper,
        )
    about: dict[str, Any] = {"subject": problem.subject, "seconds": time.perf_counter() - start}
    show(way.summary(**about), json_file, way.to_dict(**about))
    save_point(problem, F, way.end.theta, out)
    if picture:
        draw(way.plot(title=problem.subject.title), picture)


def _landscape(problem: Problem, allow_kinks: bool) -> NetworkLandscape:
    """The landscape of the problem's function."""
    from hvpspec.landscape import NetworkLandscape

    objective = problem.hessian.objective
    names = ("params", "chunk_size", "mode")
    options = {name: objective.options[name] for name in names}
    return NetworkLandscape(
        *objective.arguments, l2=objective.l2, allow_kinks=allow_kinks, **options
    )


@dataclass(frozen=True)
class _Loss:
    """The loss without l2 at a critical point: its value, index, and the resolution of that."""

    value: float
    index: int | None
    tau: float

    @property
    def rows(self) -> list[Row]:
        """Lines of the table."""
        rows: list[Row] = [("L alone", f"{self.value:.12g}", "the loss without the l2 term")]
        if self.index is not None:
            below = f"eigenvalues of its Hessian below {-self.tau:.1e}"
            rows.append(("index of L", f"{self.index:,}", below))
        return rows


def _of_the_loss(F: NetworkLandscape, point: CriticalPoint) -> _Loss:
    """What the loss alone is at a point."""
    from hvpspec import Exact, Inertia, index
    from hvpspec.landscape.critical import EXACT_UP_TO, INERTIA_UP_TO

    L, count, tau = F.of_the_loss, None, math.nan
    if F.n <= INERTIA_UP_TO:
        method = Exact() if F.n <= EXACT_UP_TO else Inertia()
        found = index(L.hessian(point.theta), method=method)
        count, tau = found.index, found.tau
    return _Loss(L.value(point.theta), count, tau)


class _Keeper:
    """Shows each point of a walk, and keeps the last one, for a walk that is stopped.

    Args:
        problem: what is walked on.
        F: its landscape.
        task: what the walk is for, in a few words.
        out: where a point is written as a checkpoint if the walk is stopped; None for nowhere.
        folder: where the last point is kept; None for nowhere.
        every: seconds between two points there.
    """

    def __init__(
        self,
        problem: Problem,
        F: NetworkLandscape,
        task: str,
        out: Path | None,
        folder: Path | None,
        every: float,
    ) -> None:
        self._problem, self._F, self._task, self._out = problem, F, task, out
        self._folder, self._every = folder, every
        self._saved, self._count = time.monotonic(), 0
        self._last: Tensor | None = None
        self._bar = bar("walking")
        self.start = F.start if self._folder is None else self._read(self._folder)

    def __enter__(self) -> _Keeper:
        self._update = self._bar.__enter__()
        return self

    def __call__(self, theta: Tensor, value: float, gradient_norm: float) -> None:
        """Show a point, and keep it if the last was kept long ago."""
        self._last, self._count = theta.clone(), self._count + 1
        told = "" if math.isnan(gradient_norm) else f", ‖∇f‖ = {gradient_norm:.1e}"
        self._update(0, 1, f"step {self._count:,}: f = {value:.9g}{told}")
        if time.monotonic() - self._saved >= self._every:
            self._write()

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        self._bar.__exit__(kind, *error)
        self._write()
        if kind is not None and self._last is not None:
            if self._folder is not None:
                typer.echo(f"the last point is kept in {self._folder}", err=True)
            save_point(self._problem, self._F, self._last, self._out)

    def _write(self) -> None:
        """Keep the last point in the folder, with what tells its walk from others."""
        if self._folder is None or self._last is None:
            return
        from safetensors.torch import save

        content = save({"theta": self._last}, metadata=self._marks())
        write_atomically(self._folder / _KEPT_POINT, content)
        self._saved = time.monotonic()

    def _read(self, folder: Path) -> Tensor:
        """The point that another run of the same command kept; the network's own if none did.

        Raises:
            InputError: the folder holds a point of something else, or a damaged file.
        """
        from safetensors import SafetensorError, safe_open

        make_folder(folder, "--checkpoint")
        file = folder / _KEPT_POINT
        if not file.exists():
            return self._F.start
        try:
            with safe_open(file, "pt") as kept:
                marks, theta = kept.metadata() or {}, kept.get_tensor("theta")
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file} is damaged ({first_line(error)}); delete it") from error
        others = [name for name, mark in self._marks().items() if marks.get(name) != mark]
        if others:
            raise InputError(
                f"{folder} holds the point of another run, with another {others[0]}; choose another"
                " folder with --checkpoint"
            )
        return self._F.point(theta)

    def _marks(self) -> dict[str, str]:
        """What tells this walk from others."""
        return {**self._problem.hessian.fingerprint(), "task": self._task}


def save_point(problem: Problem, F: NetworkLandscape, theta: Tensor, out: Path | None) -> None:
    """Write a point as a checkpoint in float64, which the other commands take."""
    if out is None:
        return
    import copy

    from hvpspec.zoo import TrainingSettings, save_checkpoint

    trained = problem.trained
    model = copy.deepcopy(trained.model).double()
    F.write(theta, model)
    settings = replace(trained.settings or TrainingSettings(), l2=problem.subject.l2)
    save_checkpoint(out, model, trained.network, data=problem.source, settings=settings)
    typer.echo(f"wrote {out}", err=True)
