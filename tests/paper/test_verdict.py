"""What the paper's page says first follows from the lines, and from nothing else."""

from examples.paper.claims import claims
from examples.paper.verdict import paragraphs


def table_line(net, state, seed=0, **changes):
    dim, bound = {"cnn": (552, 52), "mlp2": (7960, 90)}[net]
    return {
        **{"net": net, "data": "mnist", "activation": "relu", "seed": seed, "images": 100},
        **{"state": state, "epochs": 20 if state == "trained" else 0, "dtype": "float64"},
        **{"dim": dim, "bound": bound, "index": 40, "raw_count": 45, "nullity": 50},
        **{"grad_norm": 0.5, "ladder": {"1e-04": 10}, "protocol": "standard"},
        **changes,
    }


def searched_line(net, state, raw, seed=0, **changes):
    return {
        **table_line(net, state, seed),
        **{"dtype": "float32", "assembly": "blocks", "solver": "eigvalsh-live"},
        **{"images": 10, "sample": "random", "zero_rows": 10, "nullity": 410, "head": "logits"},
        "counts": dict.fromkeys(
            ("0", "floor", "1e-08", "1e-07", "1e-06", "1e-05", "1e-04", "1e-03"), 20
        )
        | {"0": raw},
        **changes,
    }


TABLE = [
    table_line("cnn", "random", index=51, raw_count=99),
    table_line("cnn", "trained", index=20, raw_count=45),
    table_line("cnn", "random", seed=1, index=49, raw_count=99),
    table_line("cnn", "trained", seed=1, index=30, raw_count=47, grad_norm=0.2),
]


def paragraph(start, table, searched=()):
    """The one that starts with some words; None if there is none."""
    return next((p for p in paragraphs(table, list(searched)) if p.startswith(f"**{start}")), None)


def test_the_cnns_row():
    text = paragraph("The CNN's row cannot", TABLE)
    assert "500 of its 552 parameters" in text
    assert "index above 52. Published are 182.9 to 238.5." in text
    assert "In 4 runs of the table the index is at most 51." in text
    assert "comes to 46 to 46 on average" in text
    near = [searched_line("cnn", "trained", 233), searched_line("cnn", "trained", 150, seed=1)]
    text = paragraph("The CNN's row cannot", TABLE, near)
    assert "Of 2 spectra of trained CNNs in the search below, 1 have" in text
    assert "all of these with 10 images; 74% to 74%" in text


def test_a_softmax_too_many():
    assert paragraph("A softmax too many", TABLE, [searched_line("cnn", "trained", 233)]) is None
    softmax = [
        searched_line("cnn", "random", 190, head="softmax", index=150),
        searched_line("cnn", "trained", 160, head="softmax", index=130),
    ]
    text = paragraph("A softmax too many", TABLE, softmax)
    assert "index is then 130 to 150 in 2 spectra" in text
    assert "agrees with 1 of 2 published means" in text
    assert "higher after training in 0 of 1 pairs" in text


def test_the_way_that_fits_and_its_pairs():
    lines = [
        searched_line(net, state, raw, seed, counts_of_seed=seed)
        for seed in range(2)
        for net, state, raw in (
            ("cnn", "random", 180),
            ("cnn", "trained", 233),
            ("mlp2", "random", 1200 + seed),
            ("mlp2", "trained", 1500 + seed),
        )
    ]
    text = paragraph("What the numbers may be", TABLE, lines)
    assert "over 10 random images, 2 seeds, in float32, by `eigvalsh-live`" in text
    assert "3 of 4 means lie within the published spread, 2 of 2 at random weights" in text
    assert "The others, 2-MLP mnist trained, are off by 3.7 to 3.7" in text
    assert "before in 2 of 2 pairs, but the count below −n u ‖H‖ in 0 of 2" in text
    assert "--images 10 --sample random --dtype float32" in text
    assert "if no unit were dead" not in text
    smooth = [searched_line("mlp2", "trained", 1980, activation="tanh")]
    text = paragraph("What the numbers may be", TABLE, [*lines, *smooth])
    assert "with tanh, where none can be, the same way of counting is off by 0.0 to 0.0" in text


def test_no_point_is_critical():
    text = paragraph("None of these points", TABLE)
    assert "At the 2 trained points ‖∇f‖ is 0.2 to 0.5, in 0 of 2 cases more" in text
    assert "50 eigenvalues or more" in text
    assert paragraph("None of these points", TABLE[1:2]) is None


def test_the_same_weights_on_more_images():
    assert paragraph("Fewer images", TABLE) is None
    more = [table_line("cnn", "trained", images=600, index=15)]
    text = paragraph("Fewer images", [*TABLE, *more])
    assert "On 600 images, those of the training" in text
    assert "against that on 100 of them, 75% to 75% of it at 1 trained weights (lower in 1)" in text


def test_claims_by_activation_and_images():
    grid, told = claims([*TABLE, table_line("mlp2", "random"), table_line("mlp2", "trained")])
    rows = [dict(zip(grid.headings, row, strict=True)) for row in grid.rows]
    assert [row["network"] for row in rows] == ["CNN, relu", "2-MLP, relu"]
    assert (rows[0]["index, trained"], rows[0]["random"]) == ("25.0 ± 7.1", "50.0 ± 1.4")
    assert (rows[0]["higher"], rows[0]["bound"], rows[0]["of n"]) == ("0 of 2", "52", "4.5%")
    assert rows[1]["std / mean"] == "–"
    assert "relu, 100 images: 0.5% to 4.5% of the parameters" in told[0]
    assert "52 of 552 or 90 of 7,960 are possible" in told[0]
    assert "spread is 28.3% to 28.3% of its mean" in told[1]
    assert "in 0 of 3 runs at the noise floor, and in 0 at 1e-04 ‖H‖" in told[2]
    alive = [table_line("mlp2", "random"), table_line("mlp2", "trained", index=41, nullity=7)]
    _, told = claims([*alive, *TABLE])
    expected = "in 1 of 3 runs at the noise floor (in 1 of these fewer eigenvalues are zero"
    assert expected in told[2]


def test_half_of_the_zeros():
    lines = [searched_line("cnn", "trained", 20 + 200 + i, i, epochs=20) for i in range(3)]
    text = paragraph("Half of what is zero", TABLE, lines)
    assert "the median 50.2%" in text  # 201 of 400
    assert "of 3 spectra in float32 with up to 16 images" in text
