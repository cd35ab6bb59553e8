"""The search over ways of counting: spectra as a script would compute them, and their scores."""

from dataclasses import asdict, replace
from functools import cache

import pandas as pd
import pytest
import torch
from torch import nn

from examples.paper.protocols import (
    CUTOFFS,
    ProtocolRun,
    by_products,
    eigenvalues,
    measure_protocol,
    plain_hessian,
    protocol_runs,
)
from examples.paper.published import PUBLISHED
from examples.paper.results import finished
from examples.paper.scoring import CELL, score_tables, scores, with_table
from hvpspec import HessianOperator, InputError, zoo


def runs(**changes):
    settings = {
        "nets": ["cnn"],
        "data": ["mnist-sample"],
        "activations": ["tanh"],
        "seeds": 1,
        "epochs": [0],
        "images": [5],
        "dtypes": ["float32", "float64"],
    }
    return protocol_runs(**{**settings, **changes})


def one(**changes):
    way = {"dtypes": ["float64"], "solvers": ["eigvalsh"], "assemblies": ["blocks"]}
    return runs(**way, **changes)


def test_the_plan_spares_what_is_dear():
    planned = runs(nets=["cnn", "mlp2"], images=[1001, 1000, 128], epochs=[0, 20])
    assert len(set(planned)) == len(planned)
    assert {r.solver for r in planned if r.net == "mlp2"} == {"eigvalsh", "eigvalsh-live"}
    eig = {(r.net, r.images) for r in planned if r.solver == "eig"}
    assert eig == {("cnn", 1000), ("cnn", 128)}
    assert {(r.net, r.images) for r in planned if r.assembly == "products"} == {("cnn", 128)}
    assert [r.images for r in planned] == sorted(r.images for r in planned)
    asked = runs(nets=["mlp2"], images=[1000], solvers=["eig"], assemblies=["products"])
    assert {(r.solver, r.assembly) for r in asked} == {("eig", "products")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_by_products_are_those_of_double_backward(dtype):
    # What torch.autograd.functional.hessian does, on a network with few parameters.
    data = zoo.load_data("mnist-sample", subset=6)
    model = nn.Sequential(nn.AvgPool2d(7), nn.Flatten(), nn.Linear(16, 3), nn.Tanh())
    model.append(nn.Linear(3, 10))
    model = model.to(dtype)
    matrix = by_products(plain_hessian(model, data.tensors, dtype))
    parameters = dict(model.named_parameters())
    loss = nn.functional.cross_entropy(model(data.inputs.to(dtype)), data.targets)
    gradient = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
    flat = torch.cat([g.flatten() for g in gradient])
    rows = [torch.autograd.grad(g, list(parameters.values()), retain_graph=True) for g in flat]
    reference = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
    assert matrix.dtype == dtype
    # Sums over a few hundred terms, none of them larger than the matrix.
    error = float((matrix - reference).abs().max() / reference.abs().max())
    assert error <= 300 * torch.finfo(dtype).eps


def test_eigenvalues_of_a_matrix_that_is_not_symmetric():
    matrix = torch.tensor([[1.0, 5.0], [-5.0, -3.0]])
    # -1 ± sqrt(4 - 25): complex, with real part -1; of the lower triangle, -1 ± sqrt(4 + 25).
    assert eigenvalues(matrix, "eig").tolist() == pytest.approx([-1.0, -1.0])
    assert eigenvalues(matrix, "eigvalsh").tolist() == pytest.approx([-1 - 29**0.5, -1 + 29**0.5])


def test_rows_of_zeros_are_eigenvalues_zero():
    generator = torch.Generator().manual_seed(0)
    live = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    live = live + live.T
    matrix = torch.zeros(20, 20, dtype=torch.float64)
    rows = torch.tensor([1, 4, 5, 11, 12, 18])
    matrix[rows[:, None], rows] = live
    expected = torch.linalg.eigvalsh(live)
    for solver in ("eig", "eigvalsh-live"):  # to the last bit, so that none counts as negative
        values = eigenvalues(matrix, solver)
        assert int((values == 0).sum()) == 14
        torch.testing.assert_close(values[values != 0].sort().values, expected)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Measures a run, each once."""
    out = tmp_path_factory.mktemp("protocols")
    return cache(lambda run: measure_protocol(run, out=out, data_dir=None))


@pytest.fixture(scope="module")
def exact():
    """The eigenvalues in double precision that all runs are after."""
    data = zoo.load_data("mnist-sample", subset=5)
    H = HessianOperator(zoo.cnn("tanh"), nn.CrossEntropyLoss(), data.tensors, dtype=torch.float64)
    return torch.linalg.eigvalsh(H.to_dense())


@pytest.mark.parametrize("run", runs())
def test_a_line_counts_at_every_cutoff(measured, exact, run):
    record = measured(run)
    dtype = getattr(torch, run.dtype)
    norm = float(exact.abs().max())
    assert record["norm"] == pytest.approx(norm, rel=1e-4)
    assert record["tau"] == pytest.approx(552 * torch.finfo(dtype).eps / 2 * norm, rel=1e-4)
    assert list(record["counts"]) == list(CUTOFFS)
    counts = list(record["counts"].values())
    assert counts[0] == record["raw_count"]
    assert counts[2:] == sorted(counts[2:], reverse=True)
    assert record["counts"]["floor"] == record["index"] <= record["bound"]
    if run.dtype == "float64":
        for cutoff in (1e-6, 1e-4, 1e-3):
            assert record["counts"][f"{cutoff:.0e}"] == int((exact < -cutoff * norm).sum())


def test_images_are_the_first_or_drawn_by_the_seed(tmp_path):
    first, drawn = one(samples=["first", "random"])
    assert (first.sample, drawn.sample) == ("first", "random")
    assert first != drawn
    losses = [
        measure_protocol(run, out=tmp_path, data_dir=None)["loss"]
        for run in (first, drawn, drawn, replace(drawn, seed=1))
    ]
    assert losses[1] == losses[2]
    data = zoo.load_data("mnist-sample")
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:5]
    for loss, rows in ((losses[0], slice(5)), (losses[1], order)):
        logits = zoo.cnn("tanh", seed=0).double()(data.inputs[rows].double())
        expected = nn.functional.cross_entropy(logits, data.targets[rows])
        assert loss == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("sample", ["first", "random"])
def test_more_images_than_there_are(tmp_path, sample):
    (run,) = one(samples=[sample], images=[2001])
    with pytest.raises(InputError, match="mnist-sample has 2000 examples"):
        measure_protocol(run, out=tmp_path, data_dir=None)


def test_lines_from_before_there_was_a_choice_of_images(tmp_path):
    (run,) = one()
    old = {**asdict(run), "raw_count": 3}
    del old["sample"]
    assert finished(tmp_path, [old], ProtocolRun) == {run: old}


def test_single_precision_counts_round_off_as_directions(measured):
    single = [run for run in runs() if run.dtype == "float32"]
    # No index can be above 52, whatever the activation.
    raw = [measured(run)["raw_count"] for run in single]
    assert min(raw) > 52


def line(cell, counts, seed=0, epochs=20, **changes):
    net, data, state = cell
    return {
        **{"net": net, "data": data, "state": state, "seed": seed},
        **{"activation": "tanh", "images": 64, "dtype": "float32"},
        **{"assembly": "blocks", "solver": "eigvalsh"},
        "epochs": epochs if state == "trained" else 0,
        "counts": {**dict.fromkeys(CUTOFFS, 0), **counts},
        **{"dim": 552, "nullity": 410, "zero_rows": 10},
        **changes,
    }


CNN = ("cnn", "mnist", "trained")
RANDOM = ("cnn", "mnist", "random")


def scored(records):
    """The scores of some lines, and the ways by epochs and cutoff."""
    found = scores(pd.DataFrame(records))
    return found, {(w["epochs"], w["cutoff"]): w for _, w in found.ways.iterrows()}


def test_scores_by_hand():
    # Published: 232.9 ± 2.88 trained, 182.91 ± 80.17 random.
    records = [
        line(CNN, {"0": 230, "1e-05": 52}, seed=0),
        line(CNN, {"0": 240, "1e-05": 52}, seed=1),
        line(CNN, {"0": 238, "1e-05": 52}, epochs=5),
        line(RANDOM, {"0": 103, "1e-05": 50}),
    ]
    found, ways = scored(records)
    assert len(ways) == len(found.ways) == 2 * len(CUTOFFS)
    long, short, coarse = ways[20, "0"], ways[5, "0"], ways[20, "1e-05"]
    counts = found.counts_of(long).set_index(CELL)
    assert counts["mean"].to_dict() == {RANDOM: 103, CNN: 235}
    assert counts["text"].to_dict() == {RANDOM: "103.0", CNN: "235.0 ± 7.1"}
    assert (long["seeds"], long["total"]) == (1, 2)
    # 2.1 / 2.88 and 79.91 / 80.17: both within one.
    assert counts["distance"][CNN] == pytest.approx(2.1 / 2.88)
    assert counts["distance"][RANDOM] == pytest.approx(79.91 / 80.17)
    assert (long["within_1"], long["within_2"]) == (2, 2)
    assert long["median"] == pytest.approx((2.1 / 2.88 + 79.91 / 80.17) / 2)
    # 5.1 / 2.88 is within two; the random state is the same.
    assert (short["within_1"], short["within_2"]) == (1, 2)
    # 180.9 / 2.88 and 132.91 / 80.17 = 1.66.
    assert (coarse["within_1"], coarse["within_2"]) == (0, 1)
    best, second = (found.ways.loc[i] for i in (0, 1))
    assert best.equals(long)
    assert second.equals(short)


def test_a_count_one_deviation_away_is_within():
    edge = PUBLISHED[CNN].mean + PUBLISHED[CNN].std
    for count, within in ((edge - 1e-4, 1), (edge + 1e-4, 0)):
        _, ways = scored([line(CNN, {"0": count})])
        assert ways[20, "0"]["within_1"] == within


def test_a_search_without_training_still_has_its_random_states():
    _, ways = scored([line(RANDOM, {"0": 183})])
    assert ways[0, "0"]["within_1"] == 1


def test_ways_of_counting_are_kept_apart():
    records = [
        line(CNN, {"0": 1}),
        line(CNN, {"0": 2}, dtype="float64"),
        line(CNN, {"0": 3}, images=128),
        line(CNN, {"0": 4}, solver="eig"),
        line(CNN, {"0": 5}, assembly="products"),
        line(CNN, {"0": 6}, activation="relu"),
        line(RANDOM, {"0": 7}, images=1),
    ]
    counts = scores(pd.DataFrame(records)).counts
    assert sorted(counts[counts["cutoff"] == "0"]["mean"]) == [1, 2, 3, 4, 5, 6, 7]


def test_every_way_is_in_the_tables_and_the_best_in_front():
    records = [
        line(CNN, {"0": 233}),
        line(RANDOM, {"0": 183}),
        line(("mlp2", "mnist", "trained"), {"0": 1, "1e-03": 1980}),
        line(CNN, {"0": 5}, activation="relu"),
    ]
    best, alone, beside, every, counts = (t.frame for t in score_tables(pd.DataFrame(records)))
    assert len(every) == len(counts) - 1 == 2 * len(CUTOFFS)
    assert best.equals(every[:10])
    top = every.iloc[0]
    assert (top["activation"], top["cutoff"], top["within 1 std"]) == ("tanh", "0", "2/3")
    assert (top["cnn"], top["mlp2"], top["mlp3"]) == ("2/2", "0/1", "0/0")
    assert alone["network"].tolist() == ["cnn", "mlp2"]
    by_net = alone.set_index("network").loc["mlp2"]
    assert (by_net["cutoff"], by_net["within 1 std"]) == ("1e-03", "1/1")
    published, first = counts.iloc[0], counts.iloc[1]
    assert (first["cnn mnist trained"], first["mlp2 mnist trained"]) == ("233.0*", "1.0")
    assert first["mlp3 mnist trained"] == "–"
    assert published["mlp3 fashion-mnist random"] == "2,721.9 ± 272.1"
    # Of the ways that count most of the numbers, the best.
    assert [tuple(row) for row in beside.iloc[:, :3].to_numpy()] == [
        *(CNN, RANDOM, ("mlp2", "mnist", "trained"))
    ]
    of_cnn = beside.iloc[0]
    assert (of_cnn["published"], of_cnn["counted"]) == ("232.9 ± 2.9", "233.0*")
    assert (of_cnn["rows not zero"], of_cnn["eigenvalues zero in these"]) == ("542", "400")


def test_data_without_a_published_number_are_not_scored():
    lines = pd.DataFrame([line(("cnn", "mnist-sample", "trained"), {"0": 233})])
    assert scores(lines).ways.empty
    assert score_tables(lines) == []


def test_heads_are_kept_apart(tmp_path):
    logits, softmax = (one(heads=[head])[0] for head in ("logits", "softmax"))
    lines = [
        {**asdict(run), **measure_protocol(run, out=tmp_path, data_dir=None)}
        for run in (logits, softmax)
    ]
    assert [r["bound"] for r in lines] == [52, None]
    assert lines[0]["loss"] != lines[1]["loss"]
    assert logits.stem != softmax.stem
    assert {"head": "logits"}.items() <= asdict(logits).items()
    of_both = [line(CNN, {}, head="softmax"), line(CNN, {})]  # the second is from before heads
    assert set(scores(pd.DataFrame(of_both)).ways["head"]) == {"logits", "softmax"}
    with pytest.raises(InputError, match="head is 'probits'; it must be one of logits, softmax"):
        measure_protocol(replace(logits, head="probits"), out=tmp_path, data_dir=None)


def test_a_way_with_several_seeds_is_the_most_complete_one():
    several = [line(CNN, {"0": 300}, images=8, seed=seed) for seed in range(3)]
    better = [line(CNN, {"0": 234}, images=10, seed=seed) for seed in range(2)]
    one = [line(CNN, {"0": 233}, images=16)]
    chosen = scores(pd.DataFrame([*one, *several, *better])).most_complete()
    assert (chosen["images"], chosen["seeds"]) == (10, 2)
    chosen = scores(pd.DataFrame([*one, *several])).most_complete()
    assert (chosen["images"], chosen["seeds"]) == (8, 3)


def of_table(protocol, **changes):
    """A run of the table."""
    ladder = {f"1e-{k:02}": 20 + k for k in range(3, 11)}
    own = {"protocol": protocol, "images": 60_000, "dtype": "float64", "raw_count": 45}
    both = line(CNN, {}, **own, index=21, ladder=ladder, **changes)
    return {name: both[name] for name in both if name not in ("counts", "solver", "assembly")}


def test_the_tables_runs_are_one_more_way():
    table = pd.DataFrame([of_table("standard"), of_table("quick", seed=1)])
    (added,) = with_table(pd.DataFrame(), table).to_dict("records")
    assert added["counts"] == {"0": 45, "floor": 21, **added["ladder"]}
    way = {"assembly": "blocks", "solver": "eigvalsh", "sample": "first"}
    assert way.items() <= added.items()
    found = scores(pd.DataFrame([added])).counts.set_index("cutoff")["mean"]
    assert (found["0"], found["floor"], found["1e-05"]) == (45, 21, 25)
    own = line(CNN, {"0": 46}, **way, images=60_000, dtype="float64")
    both = with_table(pd.DataFrame([own]), table)
    assert both["counts"].tolist() == [own["counts"]]  # the same run
    other = {**own, "seed": 2}
    assert with_table(pd.DataFrame([other]), table)["seed"].tolist() == [0, 2]
    assert with_table(pd.DataFrame([own]), pd.DataFrame())["seed"].tolist() == [0]
