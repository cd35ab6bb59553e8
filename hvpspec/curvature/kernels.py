"""Tensor operations in forms that are faster on a CPU, for the shapes that derivatives bring.

PyTorch's convolutions are made for many channels; with few they run at a few per cent of the speed
of others. Of the paper's CNN with one channel, linearised products take 0.1 of the time of double
backward with the forms here and 0.35 without; of CNNs with 4 and 8 channels, 0.53 and 0.75. And a
block of vectors multiplies one input with many weights, which PyTorch copies for each of them: a
density of the paper's perceptrons takes 1.6 times as long that way. Each form gives the same result
up to the order of summation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_aten = torch.ops.aten

# Matrices with so many columns are multiplied at full speed.
_WIDE = 64

# A matrix of fewer bytes stays in the cache when it is copied for each vector.
_LARGE = 2**20

# Convolutions with so many pairs of channels, 16 with 16 say, are as fast as others.
_MANY = 256


def bmm(A: Tensor, B: Tensor) -> Tensor:
    """Multiply batches of matrices, as one product where all on the left are one large matrix.

    An input of a layer meets a block of vectors this way: (b, N, p) with stride 0 by (b, p, D). It
    is read once, not b times, where the other side is narrow.
    """
    if not _is_shared(A, B):
        return torch.bmm(A, B)
    b, inner, columns = B.shape
    side_by_side = A[0] @ B.permute(1, 0, 2).reshape(inner, b * columns)
    return side_by_side.view(-1, b, columns).permute(1, 0, 2).contiguous()


def _is_shared(A: Tensor, B: Tensor) -> bool:
    """Whether all on the left are one large matrix, and those on the right are narrow."""
    return len(A) > 1 and A.stride(0) == 0 and B.shape[2] < _WIDE and A[0].nbytes >= _LARGE


def add_product_(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Add a product of matrices, or of batches of them, to ``x`` in its memory.

    Args:
        x: contiguous, with as many entries as the product.
        A: shape (N, p), or (b, N, p).
        B: shape (p, D), or (b, p, D).
    """
    total = x.view(*A.shape[:-1], B.shape[-1])
    if A.ndim == 2:
        total.addmm_(A, B)
    elif _is_shared(A, B):
        total.add_(bmm(A, B))
    else:
        total.baddbmm_(A, B)
    return x


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
    """Convolve, of one channel each: all examples at once as the channels of one.

    In float64, where PyTorch goes by way of a matrix with a column for each input channel, a
    convolution to fewer channels is the derivative of one to more by its input.

    Args:
        x: shape (N, C, H, W).
        weight: shape (D, C, h, w).
        bias: shape (D,), or None.
        geometry: stride, padding, dilation, whether transposed, output padding, groups.
    """
    outputs, inputs = weight.shape[:2]
    if not _is_plain(x, weight, geometry) or outputs > inputs or not x.is_contiguous():
        return torch.convolution(x, weight, bias, *geometry)
    if x.dtype == torch.float64:
        back = _turned(weight, geometry)
        like = x.new_empty(()).expand(_output_shape(x, weight, geometry))
        y: Tensor = _aten.convolution_backward(x, like, *back, [True, False, False])[0]
    elif outputs == inputs == 1:
        examples = len(x)
        alone = (*geometry[:-1], examples)
        y = torch.convolution(
            x.transpose(0, 1), weight.expand(examples, -1, -1, -1), None, *alone
        ).transpose(0, 1)
    else:
        return torch.convolution(x, weight, bias, *geometry)
    return y if bias is None else y + bias[:, None, None]


def convolution_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Sequence[int] | None,
    *geometry_and_mask: Any,
) -> tuple[Tensor | None, ...]:
    """The derivatives of a convolution, each as the convolution that is fastest.

    Args:
        gradient: by the result, shape (N, D, H', W').
        x: shape (N, C, H, W).
        weight: shape (D, C, h, w).
        bias_sizes: the shape of the bias.
        geometry_and_mask: as for :func:`convolution`, then which derivatives are wanted: by the
            input, by the weight, by the bias.
    """
    *geometry, mask = geometry_and_mask
    outputs, inputs = weight.shape[:2]
    if _is_plain(x, weight, geometry):
        back = _turned(weight, geometry)
        if mask == [True, False, False] and (x.dtype != torch.float64 or outputs < inputs):
            return convolution(gradient, *back), None, None
        # With input and gradient in each other's place, which PyTorch does fast for one channel.
        if mask == [False, True, False] and outputs < inputs:
            turned = _aten.convolution_backward(x, gradient, *back, mask)[1]
            return None, turned.transpose(0, 1).flip(2, 3), None
    return tuple(_aten.convolution_backward(gradient, x, weight, bias_sizes, *geometry, mask))


def _is_plain(x: Tensor, weight: Tensor, geometry: Sequence[Any]) -> bool:
    """Whether it is of few channels on a CPU, over images, without strides, dilation, groups."""
    stride, padding, dilation, transposed, _, groups = geometry
    return (
        x.device.type == "cpu"
        and x.ndim == 4
        and not transposed
        and groups == 1
        and weight.shape[0] * weight.shape[1] < _MANY
        and all(s == 1 for s in (*stride, *dilation))
        and all(p < size for p, size in zip(padding, weight.shape[2:], strict=True))
    )


def _turned(weight: Tensor, geometry: Sequence[Any]) -> tuple[Any, ...]:
    """Weight, no bias, and geometry of the convolution that goes back from result to input."""
    padding = [size - 1 - p for p, size in zip(geometry[1], weight.shape[2:], strict=True)]
    return weight.transpose(0, 1).flip(2, 3), None, geometry[0], padding, *geometry[2:]


def _output_shape(x: Tensor, weight: Tensor, geometry: Sequence[Any]) -> tuple[int, ...]:
    """The shape of a convolution's result."""
    sides = zip(x.shape[2:], weight.shape[2:], geometry[1], strict=True)
    return (len(x), len(weight), *(length + 2 * p - size + 1 for length, size, p in sides))


#: What takes the place of operations in a graph.
FASTER: dict[Callable[..., Any], Callable[..., Any]] = {
    _aten.bmm.default: bmm,
    _aten.convolution.default: convolution,
    _aten.convolution_backward.default: convolution_backward,
}
