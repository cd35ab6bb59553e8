"""Every result can be read: in a line, as a table, in a notebook, as plain data, as a picture."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

import hvpspec
from hvpspec import Certified, Filtered, Inertia, Quadrature, SpectralMeasure, index
from hvpspec.files import read_json, write_json
from hvpspec.linalg import IndexBound, LanczosRun, PointFacts, gauss, lanczos, measure_noise
from hvpspec.plotting import check_picture, save_figure, spectrum_histogram
from hvpspec.results import Result, Subject, plain, text_table

N = 900
VALUES = torch.cat([torch.linspace(-1, -0.5, 5), torch.linspace(-0.01, 2, N - 5)]).double()
A = hvpspec.FunctionOperator(N, lambda v: VALUES * v)
FAR = torch.diag(torch.cat([torch.tensor([-9.0]), torch.linspace(0, 1, 99)]).double())
SUBJECT = Subject("net", "data", 7, N, "mse", 0.5, None, "net.pt", {"seed": 0}, ("a note",))


def measure() -> SpectralMeasure:
    return hvpspec.spectral_measure(A, 3, 20)


def lanczos_run() -> LanczosRun:
    return lanczos(A, torch.ones(N, 1, dtype=torch.float64), 20)[0]


RESULTS: dict[str, Any] = {
    "exact index": lambda: index(A),
    "inertia index": lambda: index(A, method=Inertia()),
    "certified index": lambda: index(A, 0.25, method=Certified()),
    "ladder": lambda: index(A, method=Certified(max_matvecs=60)),
    "quadrature index": lambda: index(A, 0.25, method=Quadrature()),
    "filtered index": lambda: index(A, 0.25, method=Filtered()),
    "rung": lambda: index(A).ladder[0],
    "curve": lambda: index(A).curve(),
    "measure": measure,
    "density": lambda: measure().density(),
    "log density": lambda: measure().log_density(),
    "distribution": lambda: measure().cdf(torch.linspace(-1, 2, 500)),
    "count": lambda: measure().count(0.0),
    "outliers": lambda: measure().outliers(),
    "outlier": lambda: hvpspec.spectral_measure(FAR, 3, 20).outliers().bottom[0],
    "log-determinant": lambda: measure().expectation(lambda x: torch.log(x + 2)),
    "eigenpairs": lambda: hvpspec.eigsh(A, 30),
    "inertia": lambda: hvpspec.inertia(A, 0.1),
    "trace": lambda: hvpspec.trace(A, 30),
    "norm": lambda: hvpspec.frobenius_norm(A, 30),
    "diagonal": lambda: hvpspec.diagonal(A, 30),
    "noise": lambda: measure_noise(A, torch.Generator().manual_seed(0)),
    "facts": lambda: PointFacts(0.5, 0.1, IndexBound(2, 2, "reason " * 200), ("note " * 300,)),
    "bound": lambda: IndexBound(2, 2, "reason " * 200),
    "lanczos run": lanczos_run,
    "rule": lambda: gauss(lanczos_run()),
    "histogram": lambda: spectrum_histogram(VALUES, noise_floor=1e-9),
}


@pytest.fixture(scope="module", params=sorted(RESULTS))
def result(request: pytest.FixtureRequest) -> Any:
    return RESULTS[request.param]()


def test_the_list_has_every_public_result() -> None:
    """What the rooms export and derives from Result, by what the questions above return."""
    from hvpspec import linalg, plotting, spectrum

    public = {
        value
        for room in (linalg, spectrum, plotting)
        for value in (getattr(room, name) for name in room.__all__)
        if isinstance(value, type) and issubclass(value, Result)
    }
    assert public == {type(ask()) for ask in RESULTS.values()}


def test_repr_is_short(result: Any) -> None:
    text = repr(result)
    assert text.startswith(f"{type(result).__name__}(")
    assert len(text) < 500


def test_str_is_the_table(result: Any) -> None:
    text = str(result)
    assert text == result.summary()
    assert len(text.splitlines()) > 1
    for label, *_ in result.rows():
        assert label.strip() in text


def test_html_is_a_table_with_the_same_cells(result: Any) -> None:
    page = result._repr_html_()
    assert page.startswith("<table>")
    assert page.count("<tr>") >= len(result.rows())
    assert "<script" not in replace_first_string(result)._repr_html_()


def replace_first_string(result: Any) -> Any:
    """The same result with markup in its first text, if it has one."""
    name = next((f.name for f in fields(result) if isinstance(getattr(result, f.name), str)), None)
    if name is None or name in ("method", "which", "probes"):
        return result
    return replace(result, **{name: "<script>alert(1)</script>"})


def test_plain_data_survive_json(result: Any) -> None:
    content = result.to_dict()
    assert json.loads(json.dumps(content, allow_nan=False)) == content


def test_equality_does_not_raise(result: Any) -> None:
    assert result == result
    assert (result == object()) is False
    assert (result == replace(result)) in (True, False)


PLOTS = ("exact index", "certified index", "filtered index", "curve", "measure")
PLOTS += ("density", "log density", "distribution", "rule", "histogram")


@pytest.mark.parametrize("name", PLOTS)
def test_a_picture_is_drawn_into_given_axes(name: str, tmp_path: Path) -> None:
    figure = Figure()
    ax = figure.subplots()
    answer = RESULTS[name]()
    assert answer.plot(ax=ax) is figure
    assert figure.axes[0] is ax
    assert ax.lines or ax.patches or ax.collections
    assert ax.get_xlabel()
    own = answer.plot()
    assert own is not figure
    assert own._repr_png_().startswith(b"\x89PNG")


def test_several_measures_need_a_figure_of_their_own() -> None:
    from hvpspec.plotting import plot_density

    ax = Figure().subplots()
    with pytest.raises(hvpspec.InputError, match="ax holds one measure, got 2"):
        plot_density({"a": measure(), "b": measure()}, ax=ax)


@pytest.mark.parametrize("name", ["exact index", "measure", "eigenpairs", "histogram"])
def test_files_hold_what_to_dict_has(name: str, tmp_path: Path) -> None:
    """Paths may be strings."""
    answer = RESULTS[name]()
    path = str(tmp_path / "result.json")
    content = answer.to_dict(subject=SUBJECT, seconds=1.5)
    if name == "histogram":  # the command adds them
        content["eigenvalues"] = VALUES.tolist()
    write_json(path, content)
    assert read_json(path) == content
    assert content["subject"]["network"] == "net"
    assert content["provenance"] == {"seed": 0}
    assert content["seconds"] == 1.5


def test_paths_may_be_strings(tmp_path: Path) -> None:
    kept = str(tmp_path / "measure.npz")
    measure().save(kept)
    assert SpectralMeasure.load(kept).nodes[0].tolist() == measure().nodes[0].tolist()
    picture = str(tmp_path / "density.png")
    check_picture(picture)
    save_figure(measure().plot(), picture)
    assert Path(picture).stat().st_size > 1000
    on_disk = hvpspec.spectral_measure(A, 2, 5, basis_folder=str(tmp_path))
    assert on_disk.num_matvecs == 10


def test_old_and_new_names_of_methods_in_files(tmp_path: Path) -> None:
    content = index(A, 0.25, method=Quadrature()).to_dict()
    write_json(tmp_path / "old.json", {**content, "method": "slq"})
    assert read_json(tmp_path / "old.json")["method"] == content["method"] == "quadrature"


def test_the_subject_and_the_time_are_in_the_table() -> None:
    text = hvpspec.eigsh(A, 2).summary(subject=SUBJECT, seconds=1.25)
    assert text.startswith("net on data, 7 examples; 900 parameters\n")
    assert "1.2 s" in text
    assert "a note" in text


def test_text_is_wrapped_to_the_width() -> None:
    rows = [("a", "1", "word " * 40), ("label", "22", "")]
    for width in (30, 60, 100):
        lines = text_table("a title that may be long itself " * 3, rows, width=width).splitlines()
        assert max(map(len, lines)) <= width
        assert sum(line.count("word") for line in lines) == 40


def test_what_is_not_finite_is_null() -> None:
    assert plain([math.nan, math.inf, 1.0, torch.tensor([math.nan, 2.0])]) == [
        None,
        None,
        1.0,
        [None, 2.0],
    ]
