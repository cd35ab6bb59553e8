"""The convolutional network near a point, where max-pooling keeps its choices.

Next to almost every point the same entries stay the largest of their windows, and all derivatives
of the network are those of the function that takes these entries from the outset. That function
computes a quarter of the convolutions, as small matrix products: in float64 a product with its
Hessian takes two fifths of what it takes at the fastest otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hvpspec.errors import InputError

_PADDING = 2
_KERNEL = 5


class FixedPooling(nn.Module):
    """The network `hvpspec.zoo.cnn` with the entries given that max-pooling chooses.

    It shares the parameters of the network, under the same names and in the same order, and equals
    it where the choices are those of :meth:`inputs_for`.

    Args:
        network: from `hvpspec.zoo.cnn`.

    Raises:
        InputError: the network is another.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        layers = dict(network.named_children())
        expected = "conv1 activation1 pool1 conv2 activation2 pool2 flatten output"
        if " ".join(layers) not in (expected, f"{expected} softmax"):
            raise InputError(f"expected the layers {expected}, got {' '.join(layers)}")
        self.conv1, self.conv2, self.output = (layers[n] for n in ("conv1", "conv2", "output"))
        self._activations = layers["activation1"], layers["activation2"]
        self._head = layers.get("softmax", nn.Identity())

    @torch.no_grad()
    def inputs_for(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The inputs on which this function equals the network.

        Args:
            images: shape (N, 1, 28, 28), in the dtype of the network, which may decide a choice.

        Returns:
            The images with a margin, (N, 32 * 32), and for each entry chosen by the first and the
            second pooling, (N, 196) and (N, 49), the corner of its window in the input of the
            convolution, which has a margin, too.
        """
        padded, inputs = [], images
        for convolution, activation in zip(
            (self.conv1, self.conv2), self._activations, strict=True
        ):
            responses = activation(convolution(inputs))
            pooled, chosen = F.max_pool2d(responses, 2, return_indices=True)
            width = responses.shape[-1]
            rows, columns = chosen.flatten(1) // width, chosen.flatten(1) % width
            padded.append(rows * (width + 2 * _PADDING) + columns)
            inputs = pooled
        return _with_margin(images), padded[0], padded[1]

    def forward(self, images: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """The outputs, shape (N, 10), from what :meth:`inputs_for` gives."""
        first_activation, second_activation = self._activations
        entries = first_activation(_convolve(self.conv1, images, first, 28))
        pooled = _with_margin(entries.unflatten(1, (1, 14, 14)))
        logits = self.output(second_activation(_convolve(self.conv2, pooled, second, 14)))
        outputs: Tensor = self._head(logits)
        return outputs


def _with_margin(images: Tensor) -> Tensor:
    """Images of shape (N, 1, w, w) with zeros around, flat: (N, (w + 4)**2)."""
    return F.pad(images, (_PADDING,) * 4).flatten(1)


def _convolve(layer: nn.Module, padded: Tensor, corners: Tensor, width: int) -> Tensor:
    """Some entries of a convolution, shape (N, k), from the corners of their windows, (N, k)."""
    steps = torch.arange(_KERNEL, device=corners.device)
    window = (steps[:, None] * (width + 2 * _PADDING) + steps).flatten()
    taken = padded.gather(1, (corners[:, :, None] + window).flatten(1))
    assert isinstance(layer, nn.Conv2d)
    assert layer.bias is not None
    return taken.view(*corners.shape, len(window)) @ layer.weight.flatten() + layer.bias
