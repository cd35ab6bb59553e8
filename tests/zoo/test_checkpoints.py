import os
import pickle
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hvpspec import files
from hvpspec.errors import InputError
from hvpspec.zoo import (
    Checkpoint,
    Dataset,
    DataSource,
    NetworkSpec,
    TensorInfo,
    TrainingHistory,
    TrainingSettings,
    build_network,
    cnn,
    load_checkpoint,
    load_data,
    mlp2,
    save_checkpoint,
    train,
)

SPEC = NetworkSpec("mlp2", {"activation": "tanh"})
CODE = "torchvision.models:squeezenet1_1"
X = torch.rand(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A small checkpoint."""
    path = tmp_path / "ckpt.pt"
    save_checkpoint(path, mlp2("tanh", seed=7), SPEC, data=DataSource("mnist-sample", subset=30))
    return path


@pytest.fixture
def own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module that leaves a mark when it is imported; returns the mark's path."""
    mark = tmp_path / "imported"
    module = f"marking_module_{os.urandom(4).hex()}"
    (tmp_path / f"{module}.py").write_text(
        f"open({str(mark)!r}, 'w').close()\n"
        "import torch\n"
        "def net(width=3): return torch.nn.Linear(width, 1)\n"
        "def data(): return torch.ones(5, 3), torch.ones(5, 1)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OWN", module)
    return mark


def _edited(path: Path, **changes: object) -> Path:
    content = torch.load(path, weights_only=True)
    torch.save({**content, **changes}, path)
    return path


def test_everything_comes_back(tmp_path: Path) -> None:
    source = DataSource("mnist-sample", subset=100)
    data = load_data(source.source, subset=source.subset)
    assert isinstance(data, Dataset)
    settings = TrainingSettings("adam", epochs=2, l2=1e-4, seed=3)
    model = mlp2("tanh", seed=3)
    history = train(model, data, settings)
    save_checkpoint(tmp_path / "c.pt", model, SPEC, data=source, settings=settings, history=history)
    found = load_checkpoint(tmp_path / "c.pt")
    assert (found.network, found.data, found.settings, found.history) == (
        SPEC,
        source,
        settings,
        history,
    )
    assert not found.model.training
    assert torch.equal(found.model(X), model(X))
    assert set(found.versions) == {"hvpspec", "torch", "python"}
    assert found.versions["torch"] == torch.__version__
    assert found.num_parameters == 7960
    assert found.tensors[0] == TensorInfo("hidden.weight", (10, 784), "float32", 7840, "parameter")


def test_the_documented_layout(file: Path) -> None:
    content = torch.load(file, weights_only=True)
    assert list(content) == [
        "format",
        "version",
        "network",
        "state_dict",
        "data",
        "training",
        "versions",
    ]
    assert (content["format"], content["version"]) == ("hvpspec-checkpoint", 1)
    assert content["network"] == {"name": "mlp2", "arguments": {"activation": "tanh"}}
    assert content["data"] == {"source": "mnist-sample", "split": "train", "subset": 30}
    assert content["training"] == {"settings": None, "history": None}


def test_loading_leaves_the_callers_random_numbers(file: Path) -> None:
    state = torch.get_rng_state()
    load_checkpoint(file)
    assert torch.equal(torch.get_rng_state(), state)


def test_views_are_saved_without_what_they_are_views_of(tmp_path: Path) -> None:
    model = nn.Linear(3, 1)
    model.weight = nn.Parameter(torch.zeros(1000, 1000)[:1, :3])
    save_checkpoint(tmp_path / "c.pt", model, NetworkSpec("linear", {"in_features": 3}))
    assert (tmp_path / "c.pt").stat().st_size < 10_000


# Writing


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = file.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(InputError, match=r"cannot write .*ckpt.pt: No space left on device"):
        save_checkpoint(file, mlp2(), NetworkSpec("mlp2"))
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == ["ckpt.pt"]


def test_a_file_is_replaced_and_has_the_usual_permissions(file: Path) -> None:
    save_checkpoint(file, mlp2(), NetworkSpec("mlp2"))
    assert load_checkpoint(file).network == NetworkSpec("mlp2")
    assert os.listdir(file.parent) == ["ckpt.pt"]
    (file.parent / "usual").touch()
    assert stat.S_IMODE(file.stat().st_mode) == stat.S_IMODE((file.parent / "usual").stat().st_mode)


def test_unwritable_places(tmp_path: Path) -> None:
    (tmp_path / "a_file").touch()
    for path, message in [
        (tmp_path / "nowhere" / "c.pt", "c.pt: No such file or directory; name a file in"),
        (tmp_path / "a_file" / "c.pt", "c.pt: Not a directory"),
        (tmp_path, "it is a folder"),
    ]:
        with pytest.raises(InputError, match=f"cannot write .*{message}"):
            save_checkpoint(path, mlp2(), NetworkSpec("mlp2"))


@pytest.mark.parametrize("value", [object(), torch.ones(1), {1, 2}, 1j])
def test_arguments_must_be_plain(tmp_path: Path, value: object) -> None:
    with pytest.raises(InputError, match=r"cannot be saved: .*plain values"):
        save_checkpoint(tmp_path / "c.pt", mlp2(), NetworkSpec("mlp2", {"x": value}))
    assert os.listdir(tmp_path) == []


def test_diverged_weights_are_not_saved(tmp_path: Path) -> None:
    model = mlp2()
    nn.init.constant_(model.output.bias, torch.nan)  # type: ignore[union-attr, arg-type]
    with pytest.raises(InputError, match=r"the network: tensor 'output.bias' has NaN"):
        save_checkpoint(tmp_path / "c.pt", model, NetworkSpec("mlp2"))


# Reading


def test_a_hostile_checkpoint_does_not_run(file: Path, trap: tuple[object, Path]) -> None:
    hostile, sprung = trap
    _edited(file, network={"name": "mlp2", "arguments": hostile})
    with pytest.raises(InputError, match="could run code"):
        load_checkpoint(file)
    file.write_bytes(pickle.dumps({"format": "hvpspec-checkpoint", "x": hostile}))
    with pytest.raises(InputError, match=r"ckpt.pt"):
        load_checkpoint(file, net="mlp2")
    assert not sprung.exists()


def test_a_truncated_checkpoint(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(InputError, match="truncated, damaged"):
        load_checkpoint(file)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"c.pt does not exist; check the path"):
        load_checkpoint(tmp_path / "c.pt")
    with pytest.raises(InputError, match="is a folder"):
        load_checkpoint(tmp_path)


def test_a_newer_version(file: Path) -> None:
    with pytest.raises(InputError, match="version 2, but this hvpspec reads up to 1; upgrade"):
        load_checkpoint(_edited(file, version=2))


@pytest.mark.parametrize(
    "changes",
    [
        {"version": "1"},
        {"version": 0},
        {"network": None},
        {"network": ["mlp2"]},
        {"network": {"name": "mlp2"}, "training": {}},
        {"network": {"name": 3, "arguments": {}}},
        {"network": {"name": "mlp2", "arguments": [1]}},
        {"network": {"name": "mlp2", "code": "x"}},
        {"data": {"source": 3}},
        {"data": {"source": "mnist", "split": "dev"}},
        {"data": {"source": "mnist", "subset": -1}},
        {"training": None},
        {"training": {"settings": {"lr": -1}, "history": None}},
        {"training": {"settings": {"speed": 1}, "history": None}},
        {"training": {"settings": None, "history": {"epoch_losses": 3, "loss": 1}}},
        {
            "training": {
                "settings": None,
                "history": {"epoch_losses": [], "loss": "low", "accuracy": None},
            }
        },
        {"versions": [1]},
    ],
)
def test_a_malformed_checkpoint(file: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"ckpt.pt is a malformed checkpoint"):
        load_checkpoint(_edited(file, **changes))


@pytest.mark.parametrize(
    ("state", "message"),
    [(None, "holds no weights"), ([1], "holds no weights"), ({"a": 1}, "'a' is a int")],
)
def test_malformed_weights(file: Path, state: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_checkpoint(_edited(file, state_dict=state))


def test_arguments_that_do_not_build(file: Path) -> None:
    _edited(file, network={"name": "mlp2", "arguments": {"activation": "swish"}})
    with pytest.raises(InputError, match="unknown activation 'swish'"):
        load_checkpoint(file)


def test_foreign_weights_need_a_network(tmp_path: Path) -> None:
    torch.save(cnn(seed=2).state_dict(), tmp_path / "w.pt")
    with pytest.raises(InputError, match="not the network they belong to; pass --net, one of ml"):
        load_checkpoint(tmp_path / "w.pt")
    found = load_checkpoint(tmp_path / "w.pt", net="cnn")
    assert torch.equal(found.model(X), cnn(seed=2)(X))
    assert (found.data, found.settings, found.versions) == (None, None, {})
    with pytest.raises(InputError, match="does not say what it was trained on; pass --data"):
        found.load_data()


def test_arguments_without_a_network(file: Path) -> None:
    with pytest.raises(InputError, match="are given without --net"):
        load_checkpoint(file, net_arguments={"activation": "relu"})


def test_the_caller_may_name_the_network(file: Path) -> None:
    assert load_checkpoint(file, net="mlp2").network == SPEC
    assert load_checkpoint(file, net="mlp2", net_arguments={}).network == NetworkSpec("mlp2")
    with pytest.raises(InputError, match="do not fit the network"):
        load_checkpoint(file, net="cnn")


# Code that only the file names


def test_a_named_network_is_not_imported_unasked(tmp_path: Path, own_code: Path) -> None:
    name = f"{os.environ['OWN']}:net"
    save_checkpoint(tmp_path / "c.pt", nn.Linear(2, 1), NetworkSpec(name, {"width": 2}))
    with pytest.raises(InputError, match=f"names the code {name} .* pass --net {name} to allow"):
        load_checkpoint(tmp_path / "c.pt")
    assert not own_code.exists()
    assert load_checkpoint(tmp_path / "c.pt", net=name).num_parameters == 3
    assert own_code.exists()


def test_a_named_network_of_torchvision(tmp_path: Path) -> None:
    model = build_network(CODE, {"num_classes": 4})
    save_checkpoint(tmp_path / "c.pt", model, NetworkSpec(CODE, {"num_classes": 4}))
    found = load_checkpoint(tmp_path / "c.pt", net=CODE)
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(found.model(image), model.eval()(image))


def test_a_named_data_source_is_not_imported_unasked(tmp_path: Path, own_code: Path) -> None:
    name = f"{os.environ['OWN']}:data"
    save_checkpoint(tmp_path / "c.pt", mlp2(), NetworkSpec("mlp2"), data=DataSource(name, subset=4))
    found = load_checkpoint(tmp_path / "c.pt")
    with pytest.raises(InputError, match=f"names the code {name} .* --data {name} --subset 4"):
        found.load_data()
    assert not own_code.exists()
    assert len(_dataset(found, source=name)) == 5
    assert own_code.exists()


def test_recorded_data_and_what_overrides_them(file: Path) -> None:
    found = load_checkpoint(file)
    assert len(_dataset(found)) == 30
    assert len(_dataset(found, subset=7)) == 7
    assert len(_dataset(found, source="fashion-mnist-sample")) == 2000
    with pytest.raises(InputError, match="subset is 0"):
        found.load_data(subset=0)


def test_a_history_of_lists_is_made_of_tuples() -> None:
    assert TrainingHistory([1.0], 1.0, None).epoch_losses == (1.0,)  # type: ignore[arg-type]


def _dataset(checkpoint: Checkpoint, **options: Any) -> Dataset:
    data = checkpoint.load_data(**options)
    assert isinstance(data, Dataset)
    return data
