"""Other forms of tensor operations give what PyTorch's own do."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from hvpspec.curvature import kernels
from hvpspec.curvature.kernels import add_product_, bmm, convolution, convolution_backward

aten = torch.ops.aten
MASKS = [[True, False, False], [False, True, False], [True, True, True]]


@pytest.mark.parametrize("shared", [None, "A", "B"])
@pytest.mark.parametrize(("rows", "columns"), [(3, 5), (70, 5), (5, 70), (70, 70)])
@pytest.mark.parametrize("transposed", [False, True])
def test_bmm(
    shared: str | None,
    rows: int,
    columns: int,
    transposed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels, "_LARGE", 0)
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(4, rows, 6, generator=generator, dtype=torch.float64)
    B = torch.randn(4, 6, columns, generator=generator, dtype=torch.float64)
    if transposed:
        A, B = A.mT.contiguous().mT, B.mT.contiguous().mT
    A = A[:1].expand(4, -1, -1) if shared == "A" else A
    B = B[:1].expand(4, -1, -1) if shared == "B" else B
    result = bmm(A, B)
    torch.testing.assert_close(result, A @ B, rtol=1e-13, atol=1e-13)
    assert result.is_contiguous()
    x = torch.randn(2, 2, rows * columns, generator=generator, dtype=torch.float64)
    expected = x + (A @ B).view(x.shape)
    assert add_product_(x, A, B) is x
    torch.testing.assert_close(x, expected, rtol=1e-13, atol=1e-13)


def test_add_product_of_matrices() -> None:
    generator = torch.Generator().manual_seed(0)
    A, B, x = (torch.randn(4, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    expected = x + A @ B
    torch.testing.assert_close(add_product_(x, A, B), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [(1, 1), (1, 4), (4, 1), (3, 2)])
@pytest.mark.parametrize(
    ("size", "padding", "stride", "dilation"),
    [
        ((5, 3), (2, 1), 1, 1),
        ((5, 3), (0, 0), 1, 1),
        ((2, 3), (1, 2), 1, 1),
        ((3, 3), (4, 0), 1, 1),
        ((3, 3), (1, 1), 2, 1),
        ((3, 3), (1, 1), 1, 2),
    ],
)
def test_convolutions(
    dtype: torch.dtype,
    channels: tuple[int, int],
    size: tuple[int, int],
    padding: tuple[int, int],
    stride: int,
    dilation: int,
) -> None:
    """With the entries' own rounding errors: sums of at most N H W terms of size 1."""
    generator = torch.Generator().manual_seed(0)
    inputs, outputs = channels
    x = torch.randn(6, inputs, 9, 8, generator=generator, dtype=dtype)
    weight = torch.randn(outputs, inputs, *size, generator=generator, dtype=dtype)
    bias = torch.randn(outputs, generator=generator, dtype=dtype)
    geometry = ([stride] * 2, list(padding), [dilation] * 2, False, [0, 0], 1)
    tolerance = {"rtol": 0.0, "atol": 100 * 6 * 9 * 8 * torch.finfo(dtype).eps}
    permuted = x.transpose(0, 1).contiguous().transpose(0, 1)
    for images, b in product((x, permuted), (None, bias)):
        expected = aten.convolution(images, weight, b, *geometry)
        result = convolution(images, weight, b, *geometry)
        torch.testing.assert_close(result, expected, **tolerance)
        result.view(len(x), -1)  # as contiguous as PyTorch's
    gradient = torch.randn(expected.shape, generator=generator, dtype=dtype)
    for mask in MASKS:
        arguments = (gradient, x, weight, [outputs], *geometry, mask)
        for one, other in zip(
            convolution_backward(*arguments), aten.convolution_backward(*arguments), strict=True
        ):
            if other is None or not other.numel():
                assert one is None or not one.numel()
            else:
                torch.testing.assert_close(one, other, **tolerance)


def test_groups() -> None:
    x, weight = torch.rand(3, 4, 5, 5), torch.rand(4, 2, 3, 3)
    geometry = ([1, 1], [1, 1], [1, 1], False, [0, 0], 2)
    expected = aten.convolution(x, weight, None, *geometry)
    torch.testing.assert_close(convolution(x, weight, None, *geometry), expected)
    arguments = (expected, x, weight, None, *geometry, MASKS[0])
    torch.testing.assert_close(
        convolution_backward(*arguments)[0], aten.convolution_backward(*arguments)[0]
    )
