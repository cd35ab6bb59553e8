"""The callback logs what a direct computation finds, and does not disturb training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

import hvpspec
from hvpspec import HessianOperator, InputError
from hvpspec.lightning import CurvatureLogger


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
    last = rows[-1]
    H = HessianOperator(model.eval(), nn.CrossEntropyLoss(), data())
    values = hvpspec.eigvalsh(H)
    assert last["sharpness"] == pytest.approx(float(values[-1]), rel=1e-3)
    # n is less than the products that a trace may take, so that it is exact.
    assert last["hessian_trace"] == pytest.approx(float(values.sum()), rel=1e-3)
    count = int((values < -1e-2 * last["sharpness"]).sum())
    assert last["index_lower"] <= count <= last["index_upper"]


def test_modes_are_left_as_they_were() -> None:
    model = Classifier()
    model.train()
    model.net[0].eval()
    measured = CurvatureLogger(nn.CrossEntropyLoss(), data()).measure(model)
    assert set(measured) >= {"sharpness", "hessian_trace", "index_lower"}
    assert model.net[1].training
    assert not model.net[0].training


def test_numbers_out_of_range() -> None:
    with pytest.raises(InputError, match="every_n_epochs must be at least 1, got 0"):
        CurvatureLogger(nn.MSELoss(), data(), every_n_epochs=0)
    with pytest.raises(InputError, match="rtau must be between 0 and 1, got 2"):
        CurvatureLogger(nn.MSELoss(), data(), rtau=2)
