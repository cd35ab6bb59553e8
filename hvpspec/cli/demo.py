"""``hvpspec demo``: from training to pictures, on bundled data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hvpspec.cli.checkpoints import train_and_save
from hvpspec.cli.index import compute_index
from hvpspec.cli.options import Seed, of_output
from hvpspec.cli.problem import load_problem
from hvpspec.files import check_target, keep_apart, make_folder, write_json
from hvpspec.results import Row, number, text_table

if TYPE_CHECKING:
    from hvpspec import IndexResult

_EPOCHS = 50
_LADDER = (1e-3, 1e-4, 1e-5)  # times the norm


def demo(
    out: Annotated[
        Path, of_output("--out", "Folder to write to; made if need be.", metavar="DIR")
    ] = Path("out"),
    seed: Seed = 0,
) -> None:
    """Train a small network on bundled digits and analyse its Hessian, in about a minute."""
    checkpoint, result_file = out / "ckpt.pt", out / "index.json"
    certified_file, ladder = out / "certified.json", out / "certified.png"
    spectrum, curve = out / "spectrum.png", out / "index-curve.png"
    make_folder(out)
    targets = (checkpoint, result_file, certified_file, spectrum, curve, ladder)
    for target in targets:
        check_target(target)
    keep_apart([], [(target.name, target) for target in targets])
    from hvpspec.plotting import plot_index_curve, plot_spectrum, save_figure
    from hvpspec.zoo import DataSource, NetworkSpec, TrainingSettings

    typer.echo(f"training a 784-10-10 network on mnist-sample, {_EPOCHS} epochs ...", err=True)
    train_and_save(
        NetworkSpec("mlp2", {"activation": "relu"}),
        DataSource("mnist-sample"),
        TrainingSettings(epochs=_EPOCHS, seed=seed),
        checkpoint,
    )
    # From the file, like any other command, so that the demo shows what a user would get.
    problem = load_problem(checkpoint)
    n = problem.subject.num_parameters
    typer.echo(
        f"\ncomputing all {n:,} eigenvalues of its Hessian, some twenty seconds ...", err=True
    )
    result, seconds = compute_index(problem, "exact")
    assert result.eigenvalues is not None  # the exact method has them
    typer.echo(result.summary(subject=problem.subject, seconds=seconds))
    write_json(result_file, result.to_dict(subject=problem.subject, seconds=seconds))
    taus = [part * result.norm for part in _LADDER]
    typer.echo("\ncounting again from products alone, without the matrix ...", err=True)
    certified, took = compute_index(problem, "certified", taus)
    typer.echo(compare(certified, result, seconds=(took, seconds)))
    write_json(certified_file, certified.to_dict(subject=problem.subject, seconds=took))
    title, values = problem.subject.title, result.eigenvalues.numpy()
    floor = result.noise_floor
    save_figure(plot_spectrum(values, noise_floor=floor, scale="both", title=title), spectrum)
    save_figure(plot_index_curve(result, title=title), curve)
    save_figure(plot_index_curve(certified, title=title), ladder)
    for path, what in (
        (result_file, "the exact answer, and every eigenvalue"),
        (certified_file, "the certified answer at each resolution τ"),
        (spectrum, "the eigenvalues on a linear and on a logarithmic axis"),
        (curve, "the index as a function of the resolution τ"),
        (ladder, "the same as far as it is certified without the matrix"),
    ):
        typer.echo(f"wrote {path}: {what}")


def compare(certified: IndexResult, exact: IndexResult, *, seconds: tuple[float, float]) -> str:
    """Compare matrix-free counts with the exact ones at the same values of τ."""
    assert exact.eigenvalues is not None
    rows: list[Row] = [("τ", "τ / ‖H‖", "certified", "exact", "")]
    for rung in certified.ladder:
        count = int((exact.eigenvalues < -rung.tau).sum())
        if not rung.lower <= count <= rung.upper:
            verdict = "they DISAGREE"
        else:
            verdict = "they agree" if rung.index is not None else "the interval holds it"
        relative = f"{rung.tau / exact.norm:.2g}" if exact.norm else "–"
        known = f"{rung.index:,}" if rung.index is not None else f"[{rung.lower:,}, {rung.upper:,}]"
        rows.append((number(rung.tau), relative, known, f"{count:,}", verdict))
    both, (took, other) = (certified, exact), seconds
    rows += [
        ("products", "", *(f"{one.num_matvecs:,}" for one in both)),
        ("noise floor", "", *(number(one.noise_floor) for one in both)),
        ("time", "", f"{took:.1f} s", f"{other:.1f} s"),
        ("confidence", "", *(f"{one.confidence:.10g}" for one in both)),
    ]
    return text_table("certified beside exact", rows, right=True)
