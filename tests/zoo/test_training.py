import json
from dataclasses import asdict
from itertools import chain
from typing import Any

import pytest
import torch
from torch import nn

from hvpspec.errors import ComputationError, InputError
from hvpspec.zoo import (
    Dataset,
    TrainingSettings,
    build_loss,
    evaluate,
    linear,
    load_data,
    mlp2,
    train,
)


@pytest.fixture
def digits() -> Dataset:
    data = load_data("mnist-sample", subset=200)
    assert isinstance(data, Dataset)
    return data


@pytest.fixture
def regression() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 3, generator=generator, dtype=torch.float64)
    y = x @ torch.tensor([[1.0], [-2.0], [0.5]], dtype=torch.float64) + 3
    return Dataset("regression", x, y)


def _weights(model: nn.Module) -> torch.Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def test_same_seed_same_weights_bit_for_bit(digits: Dataset) -> None:
    def trained(seed: int) -> torch.Tensor:
        model = nn.Sequential(mlp2(seed=1), nn.Dropout(0.2))
        train(model, digits, TrainingSettings(epochs=2, momentum=0.5, seed=seed))
        return _weights(model)

    torch.rand(3)  # the caller's numbers do not matter
    state = torch.get_rng_state()
    first = trained(0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert torch.equal(first, trained(0))
    assert not torch.equal(first, trained(1))


def test_training_learns_and_tells_how_far_it_is(digits: Dataset) -> None:
    model, told = mlp2(), []
    before, _ = evaluate(model, digits)
    history = train(
        model,
        digits,
        TrainingSettings(epochs=5, batch_size=20),
        progress=lambda epoch, loss: told.append((epoch, loss)),
    )
    assert history.loss < before / 2
    assert history.accuracy is not None
    assert history.accuracy > 0.8
    assert told == list(enumerate(history.epoch_losses, start=1))
    assert (history.loss, history.accuracy) == evaluate(model, digits)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "lbfgs"])
def test_l2_is_a_term_of_the_objective(regression: Dataset, optimizer: Any) -> None:
    """Full-batch training ends at the minimum of mean squares + l2 times the squared norm."""
    l2, n = 0.3, len(regression)
    x = torch.cat([regression.inputs, torch.ones(n, 1)], dim=1)
    gram = x.T @ x / n + l2 * torch.eye(4)
    expected = torch.linalg.solve(gram, x.T @ regression.targets / n).ravel()
    model = linear(3).double()
    settings = TrainingSettings(optimizer, lr=0.05, batch_size=n, epochs=1500, l2=l2, loss="mse")
    history = train(model, regression, settings)
    assert torch.allclose(_weights(model), expected, atol=1e-6)
    objective = history.loss + l2 * _weights(model).square().sum().item()
    assert history.epoch_losses[-1] == pytest.approx(objective)
    assert history.accuracy is None


def test_one_step_is_the_textbooks(regression: Dataset) -> None:
    model = linear(3).double()
    start = _weights(model).clone()
    criterion = nn.MSELoss()
    gradient = torch.autograd.grad(
        criterion(model(regression.inputs), regression.targets), list(model.parameters())
    )
    step = torch.cat([g.ravel() for g in gradient]) + 2 * 0.1 * start
    settings = TrainingSettings(lr=0.05, batch_size=50, epochs=1, l2=0.1, loss="mse")
    train(model, regression, settings)
    assert torch.allclose(_weights(model), start - 0.05 * step)


def test_every_example_counts_once_in_an_epoch() -> None:
    seen = []

    class Recorder(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.training:
                seen.append(x[:, 0].tolist())
            return super().forward(x)

    data = Dataset("numbers", torch.arange(10.0).unsqueeze(1), torch.zeros(10, 1))
    settings = TrainingSettings(lr=1e-9, batch_size=4, epochs=2, loss="mse")
    train(Recorder(1, 1), data, settings)
    assert [len(batch) for batch in seen] == [4, 4, 2] * 2
    first, second = list(chain(*seen[:3])), list(chain(*seen[3:]))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second


def test_the_model_is_left_in_eval_mode_without_gradients(digits: Dataset) -> None:
    model = mlp2().train()
    model.hidden.weight.requires_grad_(False)  # type: ignore[union-attr, operator]
    frozen = model.hidden.weight.clone()  # type: ignore[union-attr, operator]
    train(model, digits, TrainingSettings(epochs=1))
    assert not any(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(model.hidden.weight, frozen)  # type: ignore[union-attr, arg-type]


def test_no_epochs_leave_the_start(digits: Dataset) -> None:
    model = mlp2()
    start = _weights(model).clone()
    assert train(model, digits, TrainingSettings(epochs=0)).epoch_losses == ()
    assert torch.equal(_weights(model), start)


@pytest.mark.parametrize("batch_size", [7, 50])
def test_divergence_is_an_error_with_a_remedy(regression: Dataset, batch_size: int) -> None:
    model = linear(3)
    settings = TrainingSettings(lr=1e9, batch_size=batch_size, epochs=30, loss="mse")
    with pytest.raises(ComputationError, match=r"diverged: .* in epoch \d+; lower .*1000000000"):
        train(model, regression, settings)
    assert not model.training


def test_divergence_in_the_very_last_step(regression: Dataset) -> None:
    settings = TrainingSettings(lr=1e30, batch_size=50, epochs=1, loss="mse")
    with pytest.raises(ComputationError, match="diverged: the loss is inf in epoch 1"):
        train(linear(3), regression, settings)


def test_evaluate_weighs_examples_and_restores_every_mode() -> None:
    data = load_data("mnist-sample")  # two chunks of 1000
    assert isinstance(data, Dataset)
    uneven = data.subset(1001)
    model = nn.Sequential(nn.Dropout(0.5), mlp2())
    model[1].eval()
    loss, accuracy = evaluate(model, uneven)
    assert [m.training for m in model.modules()][:3] == [True, True, False]
    outputs = model[1](uneven.inputs)
    assert loss == pytest.approx(nn.functional.cross_entropy(outputs, uneven.targets).item())
    right = (outputs.argmax(1) == uneven.targets).double().mean().item()
    assert accuracy == pytest.approx(right)


def test_probabilities_as_targets_have_no_accuracy(digits: Dataset) -> None:
    soft = Dataset("soft", digits.inputs, nn.functional.one_hot(digits.targets).double())
    loss, accuracy = evaluate(mlp2(), soft)
    assert loss == pytest.approx(evaluate(mlp2(), digits)[0])
    assert accuracy is None


def test_batch_norm_and_float64(digits: Dataset) -> None:
    model = nn.Sequential(nn.BatchNorm2d(1), mlp2("tanh")).double()
    history = train(model, digits, TrainingSettings("adam", epochs=1))
    assert next(model.parameters()).dtype == torch.float64
    assert history.loss < 2.4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "newton"}, "optimizer is 'newton'; it must be sgd, adam or lbfgs"),
        ({"lr": 0}, "lr is 0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"lr": "0.1"}, "lr is '0.1'"),
        ({"momentum": 1.0}, "momentum is 1.0"),
        ({"momentum": 0.9, "optimizer": "adam"}, "adam has none"),
        ({"momentum": 0.9, "optimizer": "lbfgs"}, "lbfgs has none"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 2.0}, "batch_size is 2.0"),
        ({"epochs": -1}, "epochs is -1"),
        ({"l2": -0.1}, "l2 is -0.1"),
        ({"l2": float("inf")}, "l2 is inf"),
        ({"seed": -3}, "seed is -3"),
        ({"loss": "hinge"}, "loss is 'hinge'; it must be cross_entropy or mse"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TrainingSettings(**settings)


def test_settings_are_plain_data_with_the_learning_rate_filled_in() -> None:
    assert TrainingSettings().lr == 0.1
    settings = TrainingSettings("adam", l2=0.01)
    assert settings.lr == 0.001
    assert TrainingSettings(**json.loads(json.dumps(asdict(settings)))) == settings


def test_what_does_not_fit_is_named(digits: Dataset, regression: Dataset) -> None:
    with pytest.raises(InputError, match=r"cannot take inputs of shape \(64, 1, 28, 28\)"):
        train(linear(3), digits)
    with pytest.raises(InputError, match=r"mse needs equal shapes, not .*\(50, 1\) .*\(50,\)"):
        evaluate(
            linear(3), Dataset("flat", *(regression.inputs, regression.targets[:, 0])), loss="mse"
        )
    with pytest.raises(InputError, match="the loss CrossEntropyLoss cannot take outputs of shape"):
        evaluate(mlp2(), Dataset("eleven", digits.inputs, digits.targets + 1))
    with pytest.raises(InputError, match="no trainable parameters"):
        train(mlp2().requires_grad_(False), digits)
    with pytest.raises(InputError, match="data is a list; training needs a Dataset"):
        train(mlp2(), [digits.tensors])  # type: ignore[arg-type]
    with pytest.raises(InputError, match="the network returns a tuple"):
        evaluate(nn.LSTM(28, 10), Dataset("rows", digits.inputs[:, 0], digits.targets))
    with pytest.raises(InputError, match="loss is 'hinge'"):
        build_loss("hinge")  # type: ignore[arg-type]
