"""The pages of results are what the lines say, and so is every number of docs/paper.md."""

import re
from functools import cache
from pathlib import Path

import pandas as pd
import pytest

from examples.paper import curves, linear, regularised, scoring, solutions, spectra, table
from examples.paper.commands import page
from examples.paper.published import PUBLISHED
from examples.paper.results import read

DOCS = Path(__file__).parents[2] / "docs"
TABLES = {
    "table": table.table_tables,
    "protocols": lambda lines: scoring.score_tables(scoring.with_table(lines, lines_of("table"))),
    "curves": curves.curve_tables,
    "regularised": regularised.regularised_tables,
    "spectra": spectra.spectra_tables,
    "solutions": solutions.solution_tables,
    "linear": linear.linear_tables,
}


@cache
def lines_of(name):
    return pd.DataFrame(read(DOCS / "results" / f"{name}.jsonl"))


@cache
def prose():
    """The page's text without its tables, in one line."""
    text = (DOCS / "paper.md").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("|")]
    return " ".join(" ".join(lines).replace("\\", "").split())


@pytest.mark.parametrize("name", TABLES)
def test_the_pages_of_results_are_made_of_the_lines(name):
    made = page(name, TABLES[name](lines_of(name)))
    assert made == (DOCS / "results" / f"{name}.md").read_text(encoding="utf-8")


def test_the_tables_and_pictures_of_the_page_are_those_of_the_results():
    text = (DOCS / "paper.md").read_text(encoding="utf-8")
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    results = "".join((DOCS / "results" / f"{name}.md").read_text() for name in TABLES)
    assert len(tables) == 2
    assert [found for found in tables if found not in results] == []
    pictures = re.findall(r"\]\((results/[^)]+)\)", text)
    assert len(pictures) == 9
    assert [name for name in pictures if not (DOCS / name).exists()] == []


def span(values, form=",.0f"):
    return f"{min(values):{form}} to {max(values):{form}}"


def of(found):
    """How many of some are true, in numbers."""
    return f"{found.sum()} of {len(found)}"


def about_the_table():
    lines = table.with_ladder(lines_of("table"))
    cnn, trained = lines[lines["net"] == "cnn"], lines[lines["state"] == "trained"]
    dim, bound = cnn["dim"].iloc[0], cnn["bound"].iloc[0]
    published = [number.mean for (net, *_), number in PUBLISHED.items() if net == "cnn"]
    after = cnn[cnn["state"] == "trained"]
    raw = after.groupby(["data", "activation", "images"])["raw_count"].mean()
    yield f"{dim - bound} of the CNN's {dim} parameters"
    yield f"so the index is at most {bound}"
    yield f"means are {span(published, '.1f')}"
    yield f"In our {len(cnn)} runs of the CNN the index never exceeds {cnn['index'].max()}"
    yield f"averages only {span(raw)}"

    pairs = table.before_and_after(lines)
    larger = pairs["grad_norm"] > pairs["grad_norm_before"]
    yield f"At the {len(trained)} trained points ‖∇f‖ is {span(trained['grad_norm'], '.2g')}"
    yield f"in {of(larger)} cases it is larger than at the initial weights"
    yield f"at least {trained['nullity'].min()} eigenvalues are zero"

    point = ["net", "data", "activation", "seed", "epochs", "state"]
    few, many = (lines[lines["images"] == images] for images in (10_000, 60_000))
    both = few.merge(many, on=point, suffixes=("", "_of_all"))
    part = both["index_of_all"] / both["index"]
    ends = both["state"] == "trained"
    yield f"on all {60_000:,} training images is {span(part[ends], '.0%')} of the index"
    yield f"first {10_000:,} of them, at {ends.sum()} trained points"
    yield f"At {(~ends).sum()} random ones it is {span(part[~ends], '.0%')}"

    cells = pairs.groupby(["activation", "images", "net", "data"])
    share = (cells["index"].mean() / cells["dim"].first()).rename("share").reset_index()
    spread = (cells["index"].std() / cells["index"].mean()).rename("spread").reset_index()
    relu = share[share["activation"] == "relu"]["share"]
    tanh = share[share["activation"] == "tanh"]["share"]
    yield f"With relu it is {span(relu, '.1%')} of the number of parameters"
    yield f"with tanh {span(tanh, '.1%')}"
    yield f"the standard deviation over seeds is at most {spread['spread'].max():.0%} of the mean"
    perceptrons = spread[spread["net"] != "cnn"]["spread"]
    yield f"and at most {perceptrons.max():.0%} for the perceptrons"
    risen = pairs["index"] > pairs["index_before"]
    coarse = pairs["1e-04"] > pairs["1e-04_before"]
    freer = pairs["nullity"] < pairs["nullity_before"]
    all_images = pairs["images"] == 60_000
    yield f"The index rises in {of(risen[~all_images])} runs"
    yield f"{of(risen[all_images])} on all images"
    relu_risen = pairs[risen & (pairs["activation"] == "relu")].index
    yield f"{len(relu_risen)} of these runs have relu, and in {freer[relu_risen].sum()} of them"
    yield f"rises in {of(coarse[~all_images])} and {of(coarse[all_images])} runs"
    yield f"{len(lines)} runs and {lines['seconds'].sum() / 3600:.0f} hours of one core"


def about_the_search():
    lines = scoring.with_table(lines_of("protocols"), lines_of("table"))
    raw = lines["counts"].map(lambda counts: counts["0"])
    floor = lines["counts"].map(lambda counts: counts["floor"])
    published = [PUBLISHED[cell] for cell in lines[scoring.CELL].itertuples(index=False)]
    near = (raw - [number.mean for number in published]).abs() <= [n.std for n in published]
    logits = lines["head"] == "logits"
    cnn = lines[(lines["net"] == "cnn") & (lines["state"] == "trained") & logits]
    hits = cnn[near[cnn.index]]
    *some, last = sorted(hits["images"].unique())
    zeros = hits["nullity"] / hits["dim"]
    yield f"in {len(hits)} of {len(cnn):,} spectra of trained CNNs"
    yield f"from {', '.join(map(str, some))} or {last} images"
    yield f"where {span(zeros, '.0%')} of the eigenvalues are zero"

    softmax = lines[~logits]
    indices = softmax[softmax["net"] == "cnn"]["index"]
    best = scoring.scores(softmax).ways.iloc[0]
    pairs = table.before_and_after(softmax.assign(raw=raw[softmax.index]))
    yield f"index is then {span(indices)} in {len(indices)} spectra"
    yield f"agrees with {best['within_1']} of {best['total']} published means"
    yield f"rises during training in {of(pairs['raw'] > pairs['raw_before'])} pairs only"

    # Where rows of zeros are set apart, their eigenvalues are exact; older lines do not tell.
    apart = lines["nullity"] - lines["zero_rows"].fillna(lines["nullity"])
    small = lines["nullity"].where(lines["solver"] == "eigvalsh", apart)
    parts = ((raw - floor) / small)[small >= 100]
    few = lines["images"] <= 16
    median = {
        (dtype, name): parts[(lines["dtype"] == dtype) & own].median()
        for dtype in ("float64", "float32")
        for name, own in (("few", few), ("more", ~few))
    }
    yield f"Where at least {100} eigenvalues are"
    yield f"below zero is {median['float64', 'few']:.1%} in float64"
    yield f"{median['float32', 'few']:.1%} in float32 with up to {16} images"
    yield f"more images it is {median['float64', 'more']:.1%} and {median['float32', 'more']:.1%}"

    found = scoring.scores(lines)
    way = found.most_complete()
    counts = found.counts_of(way)
    random = counts["state"] == "random"
    far = counts[~counts["within_1"]]
    yield f"{way['activation']} networks, {way['images']} {way['sample']} images, {way['dtype']}"
    yield f"(`{way['solver']}`), and every eigenvalue below {way['cutoff']} counted"
    yield f"With {way['seeds']} seeds, {way['within_1']} of {way['total']} means lie"
    yield f"{of(counts['within_1'][random])} at random weights"
    yield f"{of(counts['within_1'][~random])} after training"
    assert {*zip(far["net"], far["state"], strict=True)} == {
        *(("mlp2", "trained"), ("mlp3", "trained")),
    }
    assert len(far) == 4
    yield f"are off by {span(far['distance'], '.1f')} published standard deviations"
    yield f"one of {len(found.ways):,} ways of counting"
    yield f"{(found.ways['total'] == 12).sum()} of which cover all {12} means"
    own = scoring.belonging(lines, way)
    own = own[own["net"] != "cnn"]
    pairs = table.before_and_after(own.assign(raw=raw[own.index], floor=floor[own.index]))
    yield f"after training in {of(pairs['raw'] > pairs['raw_before'])} pairs"
    yield f"−n u ‖H‖ in only {of(pairs['floor'] > pairs['floor_before'])}"
    smooth = found.ways[scoring.SCORE].eq({**way[scoring.SCORE], "activation": "tanh"}).all(axis=1)
    (other,) = found.ways[smooth].index
    missed = found.counts_of(found.ways.loc[other]).merge(far[scoring.CELL], on=scoring.CELL)
    yield f"within {span(missed['distance'], '.1f')} standard deviations"
    yield f"({found.ways.loc[other, 'seeds']} seeds)"
    yield (
        f"protocols --activation {way['activation']} --images {way['images']}"
        f" --sample {way['sample']} --dtype {way['dtype']} --assembly {way['assembly']}"
    )
    yield (f"--solver {way['solver']} --epochs 0 --epochs {way['epochs']} --seeds {way['seeds']}")
    same = lines[(lines["net"] == "mlp2") & (lines["assembly"] == "blocks")].assign(raw=raw)
    where = ["data", "activation", "state", "seed", "epochs", "images", "dtype", "sample"]
    solved = same.pivot_table("raw", where, "solver").dropna()
    ends = solved.groupby("state").first()
    assert len(solved) == 2
    for solver in ("eig", "eigvalsh-live", "eigvalsh"):
        a, b = (f"{ends.loc[state, solver]:,.0f}" for state in ("random", "trained"))
        yield f"{a} and {b}"


def about_the_spectra():
    lines = lines_of("spectra")
    told = pd.DataFrame(
        [
            {"matrix": matrix, "net": line["net"], **found}
            for line in lines.to_dict("records")
            for matrix, found in line["spectra"].items()
        ]
    )
    hessians = told[told["matrix"] == "hessian"]
    for matrix in ("gauss-newton", "output"):
        assert set(told[told["matrix"] == matrix]["index"]) == {0}
    outputs = told[told["matrix"] == "output"]
    yield f"{span(hessians['above'].map(len))} outliers above it"
    assert hessians["below"].map(len).sum() == 1
    yield f"differs from the Hessian by {span(lines['relative_difference'].dropna(), '.0%')}"
    for group in (outputs["net"] == "cnn", outputs["net"] != "cnn"):
        (nullity,) = set(outputs[group]["nullity"])
        yield f"nullity {nullity}"


def about_trainings_and_penalties():
    lines = lines_of("curves")
    training = ["activation", "optimizer"]
    groups = curves.trajectories(lines).groupby(training)
    found = pd.Series([curves.rank_correlation(own) for _, own in groups])
    assert found.isna().sum() == 1
    yield f"is {found.min():.2f} to {found.max():.2f}".replace("-", "−")
    (sgd,) = set(lines[(lines["activation"] == "relu") & (lines["optimizer"] == "sgd")]["index"])
    yield f"its index is {sgd} throughout"

    lines = lines_of("regularised")
    fixed, again = lines[lines["l2"].isna()], lines[lines["l2"] > 0]
    yield f"λ = {fixed['nondegenerate_from'].max():.0e}"
    yield f"{fixed['degenerate_part'].max():.0e} of the smaller λ"
    for state in ("random", "trained"):
        own = fixed[fixed["state"] == state]["positive_from"]
        yield f"λ = {own.min():.2g} to {own.max():.2g}"
    assert again["nondegenerate"].all()
    yield f"in all {len(again)} retrained networks"
    last = again[again["l2"] == 0.01].set_index("activation")["index"]
    yield f"λ = 0.01 the index is {last['relu']} with relu and {last['tanh']} with tanh"


def about_solutions_and_regressions():
    lines = solutions.once(lines_of("solutions"))
    indexed = lines[lines["indexed"]]
    one, two = lines["explained"].iloc[0][:2]
    yield f"{len(lines)} CNNs were trained on the same {lines['images'].iloc[0]:,} images"
    yield f"explain {one:.0%} and {two:.0%} of the variance"
    yield f"{lines['mean_distance'].mean():.1f} apart on average"
    yield f"moved by {lines['moved'].mean():.1f}"
    yield f"losses of {span(lines['loss'], '.2f')}"
    (bound,) = set(indexed["bound"])
    yield f"of {len(indexed)} of them is {span(indexed['index'])}, of {bound:.0f}"
    yield f"rank correlation with the loss is {solutions.rank_correlation(indexed):.2f}"

    lines = lines_of("linear")
    assert (lines["nullity"] == lines["expected_nullity"]).all()
    assert set(lines["index"]) == {0}
    yield f"In {len(lines)} regressions the index is {0}"
    yield f"raw count is up to {lines['raw_count'].max()}"
    yield f"agrees with 2 XᵀX + 2 λI to {lines['relative_error'].max():.0e}"
    (half,) = {f"{x:.0%}" for x in lines["relative_error_without_2"]}
    yield f"off by {half}"


PARTS = [
    about_the_table,
    about_the_search,
    about_the_spectra,
    about_trainings_and_penalties,
    about_solutions_and_regressions,
]


@pytest.mark.parametrize("part", PARTS)
def test_the_prose_has_these_numbers(part):
    text = prose()
    assert [fragment for fragment in part() if fragment not in text] == []


def test_the_prose_has_no_other_numbers():
    """What is left without them are names: of the paper, of networks, of the factor 2."""
    text = prose()
    names = [
        "PMLR 197 (2023)",
        "2-MLP",
        "Example 1",
        "factor 2",
        "10⁻⁴",
        "2λ",
        "λ > 0",
        "float32",
        "float64",
    ]
    for fragment in sorted([*(f for part in PARTS for f in part()), *names], key=len)[::-1]:
        text = text.replace(fragment, "…")
    assert re.findall(r".{30}\d.{10}", text) == []
