"""The network with its choices fixed has the derivatives of the network."""

from functools import cache

import pytest
import torch
from torch import nn

from examples.paper.points import hessian_at
from examples.paper.pooling import FixedPooling
from hvpspec import HessianOperator, zoo
from hvpspec.errors import InputError


@cache
def trained(activation, epochs):
    model = zoo.cnn(activation, seed=1)
    settings = zoo.TrainingSettings(optimizer="adam", epochs=epochs)
    zoo.train(model, zoo.load_data("mnist-sample"), settings)
    return model


# Every two of the three choices together once, not all three.
@pytest.mark.parametrize(
    ("epochs", "activation", "dtype"),
    [
        (0, "relu", torch.float32),
        (0, "tanh", torch.float64),
        (0, "sigmoid", torch.float32),
        (2, "relu", torch.float64),
        (2, "tanh", torch.float32),
        (2, "sigmoid", torch.float64),
    ],
)
def test_the_same_hessian_loss_gradient_and_bound(activation, epochs, dtype):
    # The black margins of the images make ties in most windows of the first pooling.
    model = trained(activation, epochs)
    few = zoo.load_data("mnist-sample", subset=10)
    before = {name: p.clone() for name, p in model.named_parameters()}
    H = hessian_at(model, few, dtype)
    reference = HessianOperator(model, nn.CrossEntropyLoss(), few.tensors, dtype=dtype)
    exact, matrix = reference.to_dense(), H.to_dense()
    assert matrix.dtype == dtype
    # The longest sum on the way to an entry is over the pixels of all images.
    tolerance = 10 * 784 * torch.finfo(dtype).eps
    assert float((matrix - exact).abs().max()) <= tolerance * float(exact.abs().max())
    difference = H.gradient() - reference.gradient()
    assert float(difference.abs().max()) <= tolerance * float(reference.gradient().abs().max())
    assert H.loss() == pytest.approx(reference.loss(), rel=tolerance)
    assert H.structural_upper_bound().upper == reference.structural_upper_bound().upper == 52
    assert H.space.names == reference.space.names
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert next(model.parameters()).dtype == torch.float32


def test_probabilities_taken_for_logits_have_no_bound():
    # The loss is no longer convex in what the last layer returns, of 500 parameters out of 552.
    model, few = zoo.cnn(softmax=True), zoo.load_data("mnist-sample").subset(60)
    H = hessian_at(model, few, torch.float64)
    matrix = H.to_dense()
    exact = HessianOperator(model, nn.CrossEntropyLoss(), few.tensors, dtype=torch.float64)
    tolerance = 60 * 784 * torch.finfo(torch.float64).eps * float(matrix.abs().max())
    assert float((matrix - exact.to_dense()).abs().max()) <= tolerance
    assert H.structural_upper_bound() is None or H.structural_upper_bound().upper == 552
    values = torch.linalg.eigvalsh(matrix)
    assert int((values < -1e-6 * values.abs().max()).sum()) > 52


def test_other_networks_are_refused():
    with pytest.raises(InputError, match="expected the layers conv1"):
        FixedPooling(zoo.mlp2())
