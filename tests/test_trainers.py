"""Callbacks log what a direct computation finds, and do not disturb training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import transformers
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

import hvpspec
from hvpspec import HessianOperator, InputError
from hvpspec.lightning import CurvatureLogger
from hvpspec.monitoring import CurvatureMonitor
from hvpspec.transformers import CurvatureCallback


class Classifier(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, _: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.05)


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(60, 3, generator=generator)
    return X, (X[:, 0] * X[:, 1] > 0).long()


def fit(folder: Path, *callbacks: pl.Callback) -> tuple[Classifier, list[dict[str, float]]]:
    """Train for four epochs; return the model and the rows that were logged."""
    pl.seed_everything(1, verbose=False)
    model = Classifier()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data()), batch_size=20)
    logger = CSVLogger(folder)
    trainer = pl.Trainer(
        max_epochs=4,
        logger=logger,
        callbacks=list(callbacks),
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        log_every_n_steps=1,
    )
    trainer.fit(model, loader)
    return model, logger.experiment.metrics if not callbacks else read(Path(logger.log_dir))


def read(folder: Path) -> list[dict[str, float]]:
    head, *rows = (folder / "metrics.csv").read_text().splitlines()
    names = head.split(",")
    return [
        {name: float(cell) for name, cell in zip(names, row.split(","), strict=True) if cell}
        for row in rows
    ]


@pytest.mark.filterwarnings("ignore")  # Lightning's own, on loaders, devices and its dependencies
def test_it_logs_what_is_there_and_leaves_training_alone(tmp_path: Path) -> None:
    callback = CurvatureLogger(nn.CrossEntropyLoss(), data(), every_n_epochs=2)
    plain, _ = fit(tmp_path / "plain")
    model, rows = fit(tmp_path / "watched", callback)
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert [row["epoch"] for row in rows] == [1, 3]
    check(rows[-1], HessianOperator(model.eval(), nn.CrossEntropyLoss(), data()))


def check(last: dict[str, float], H: HessianOperator) -> None:
    """Hold what was logged last against all eigenvalues."""
    values = hvpspec.eigvalsh(H)
    assert last["sharpness"] == pytest.approx(float(values[-1]), rel=1e-3)
    noise = H.shape[0] * H.unit_roundoff * float(values.abs().max())
    assert (values - last["sharpness"]).abs().min() <= last["sharpness_error"] + noise
    # n is less than the products that a trace may take, so that it is exact.
    assert last["hessian_trace"] == pytest.approx(float(values.sum()), rel=1e-3)
    count = int((values < -1e-2 * last["sharpness"]).sum())
    assert last["index_lower"] <= count <= last["index_upper"]


class Reader(nn.Module):
    """Takes and returns what models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Classifier()

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.net(inputs)
        found = {} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}
        return {**found, "logits": logits}


def train(folder: Path, *, watched: bool, half: bool) -> tuple[Reader, list[dict[str, float]]]:
    """Train for twelve steps; return the model and what was logged."""
    X, y = data()
    transformers.set_seed(1)
    model = Reader()
    settings = transformers.TrainingArguments(
        str(folder),
        num_train_epochs=4,
        per_device_train_batch_size=20,
        logging_steps=3,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=half,
        disable_tqdm=True,
    )
    examples = [{"inputs": x, "labels": label} for x, label in zip(X, y, strict=True)]
    trainer = transformers.Trainer(model, settings, train_dataset=examples)
    if watched:
        batch = {"inputs": X, "labels": y}
        callback = CurvatureCallback(trainer, loss_of_logits, batch, every_n_steps=6)
        trainer.add_callback(callback)
    trainer.train()
    return model, trainer.state.log_history


def loss_of_logits(outputs: dict[str, Tensor], labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs["logits"], labels)


@pytest.mark.filterwarnings("ignore")  # those of accelerate, on devices
@pytest.mark.parametrize("half", [False, True])
def test_the_trainer_of_transformers_logs_the_same(half: bool, tmp_path: Path) -> None:
    plain, losses = train(tmp_path / "plain", watched=False, half=half)
    model, logged = train(tmp_path / "watched", watched=True, half=half)
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q)
    rows = [row for row in logged if "sharpness" in row]
    assert [row["step"] for row in rows] == [6, 12]
    # The trainer's own rows are there as they would be without.
    own = [row["loss"] for row in losses if "loss" in row]
    assert len(own) == 4
    assert [row["loss"] for row in logged if "loss" in row] == own
    X, y = data()
    fresh = Reader()
    fresh.load_state_dict(model.state_dict())
    H = HessianOperator(fresh.eval(), loss_of_logits, {"inputs": X, "labels": y})
    check(rows[-1], H)


def test_modes_are_left_as_they_were() -> None:
    model = Classifier()
    model.train()
    model.net[0].eval()
    measured = CurvatureMonitor(nn.CrossEntropyLoss(), data()).measure(model)
    assert set(measured) >= {"sharpness", "hessian_trace", "index_lower"}
    assert model.net[1].training
    assert not model.net[0].training


def test_training_that_has_diverged() -> None:
    model = Classifier()
    torch.nn.init.constant_(model.net[0].weight, float("nan"))
    monitor = CurvatureMonitor(nn.CrossEntropyLoss(), data())
    with pytest.warns(UserWarning, match="no curvature is logged: the loss is nan"):
        assert monitor.measure_if_finite(model) == {}


def test_numbers_out_of_range() -> None:
    with pytest.raises(InputError, match="'max_matvec' is not an argument of CurvatureMonitor"):
        CurvatureMonitor(nn.MSELoss(), data(), max_matvec=20)
    with pytest.raises(InputError, match="max_matvecs must be a whole number, 10 or more, got 20"):
        CurvatureMonitor(nn.MSELoss(), data(), max_matvecs=20.5)
    with pytest.raises(InputError, match="every_n_epochs must be at least 1, got 0"):
        CurvatureLogger(nn.MSELoss(), data(), every_n_epochs=0)
    with pytest.raises(InputError, match="rtau must be between 0 and 1, got 2"):
        CurvatureLogger(nn.MSELoss(), data(), rtau=2)
    with pytest.raises(InputError, match="every_n_steps must be at least 1, got 0"):
        CurvatureCallback(None, nn.MSELoss(), data(), every_n_steps=0)
