"""What the experiments of ``python -m examples.paper`` share: check, carry out, show."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from examples.paper.progress import sweep_bar
from hvpspec.errors import ComputationError
from hvpspec.files import check_target, keep_apart, make_folder, write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from examples.paper.results import Record
    from examples.paper.sweep import Measure
    from hvpspec.report import Grid

# Characters, for a table that goes to a file and not to a terminal.
_WIDEST = 1000


def carry_out(
    name: str,
    runs: Sequence[Any],
    measure: Measure[Any],
    show: Callable[[list[Record]], list[Grid]],
    *,
    describe: Callable[[Any], str],
    out: Path,
    draw: Callable[[list[Record]], Mapping[str, Figure]] | None = None,
    cost: Sequence[str] = (),
    jobs: int = 1,
    sources: Sequence[Path] = (),
) -> None:
    """Carry out the runs that are left, and make the tables anew from all there are.

    The first table is printed; all are written as Markdown, and figures as PNG, after an interrupt
    from the keyboard, too.

    Args:
        name: of the experiment and its files.
        runs: what is to be done, all of one kind.
        measure: carries one out.
        show: makes tables of the lines of all runs.
        describe: names a run.
        out: folder of the results.
        draw: makes figures, by the names of their files without ending, of the same lines.
        cost: fields that decide how long a run takes.
        jobs: processes.
        sources: files of the data.

    Raises:
        InputError: the files cannot be used.
        ComputationError: some runs failed; the others are done and kept.
    """
    from examples.paper.results import finished, read
    from examples.paper.sweep import sweep
    from hvpspec.report import grid_markdown, grid_table

    make_folder(out)
    path, page = out / f"{name}.jsonl", out / f"{name}.md"
    check_target(path)
    check_target(page)
    keep_apart((("--data", file) for file in sources), [("--out", path), ("--out", page)])

    def tell() -> None:
        """Make tables and figures of all lines."""
        records = list(finished(path, read(path), type(runs[0])).values())
        if not records:
            return
        grids = show(records)
        console, table = Console(), grid_table(grids[0])
        if not console.is_terminal:
            wide = console.options.update_width(_WIDEST)
            console.width = max(console.width, console.measure(table, options=wide).maximum)
        console.print(table)
        made = f"Made by `python -m examples.paper {name}` from `{path.name}`."
        head = f"# {name.capitalize()}\n\n{made}\n"
        write_atomically(page, "\n".join([head, *map(grid_markdown, grids)]).encode())
        typer.echo(f"wrote {path}: a line of JSON for each run")
        typer.echo(f"wrote {page}: all tables, made from these lines")
        if draw is not None:
            from hvpspec.plotting import save_figure

            for stem, figure in draw(records).items():
                save_figure(figure, out / f"{stem}.png")
                typer.echo(f"wrote {out / stem}.png")

    try:
        with sweep_bar(describe) as watch:
            failures = sweep(runs, measure, path, cost=cost, jobs=jobs, watch=watch)
    except KeyboardInterrupt:
        typer.echo(f"what is done is kept in {path}; the same command goes on from there", err=True)
        tell()
        raise
    tell()
    if failures:
        first = failures[0]
        raise ComputationError(
            f"{len(failures)} of {len(runs)} runs failed and have no line; the first,"
            f" {describe(first.run)}:\n{type(first.error).__name__}: {first.error}"
        ) from first.error


def carry_out_at_points(
    name: str,
    runs: Sequence[Any],
    measure: Callable[..., Record],
    show: Callable[[list[Record]], list[Grid]],
    *,
    out: Path,
    data_dir: Path | None,
    draw: Callable[[list[Record]], Mapping[str, Figure]] | None = None,
    cost: Sequence[str],
    jobs: int,
) -> None:
    """Carry out runs at points with images, when networks and data are found to be good.

    Args:
        name: as for :func:`carry_out`, like what is not named here.
        runs: points with ``images``.
        measure: takes a run, ``out`` and ``data_dir``.
        show: makes tables.
        out: folder of the results.
        data_dir: folder of the full data sets.
        draw: makes figures.
        cost: fields that decide how long a run takes.
        jobs: processes.

    Raises:
        InputError: an activation is unknown, data are not found or too few, or the files cannot be
            used.
        ComputationError: some runs failed; the others are done and kept.
    """
    from examples.paper.points import images_of
    from hvpspec.zoo import build_network, source_files

    for net, activation in {(run.net, run.activation) for run in runs}:
        build_network(net, {"activation": activation})
    most = max(run.images for run in runs)
    data = sorted({run.data for run in runs})
    for source in data:
        images_of(source, data_dir).subset(most)
    carry_out(
        name,
        runs,
        partial(measure, out=out, data_dir=data_dir),
        show,
        describe=describe_point,
        out=out,
        draw=draw,
        cost=cost,
        jobs=jobs,
        sources=[file for source in data for file in source_files(source, data_dir)],
    )


def describe_point(run: Any) -> str:
    """Name a run at a point, by what distinguishes it.

    Args:
        run: a point with the settings of its Hessian.
    """
    from dataclasses import fields

    from examples.paper.points import Point

    known = {field.name for field in fields(Point)}
    others = [f"{f.name} {getattr(run, f.name)}" for f in fields(run) if f.name not in known]
    epochs = f"{run.epochs} epochs" if run.epochs > 1 else ("1 epoch" if run.epochs else "random")
    point = f"{run.net} {run.activation} {run.data} {epochs} seed {run.seed}"
    return ", ".join([point, *others])
