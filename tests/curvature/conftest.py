"""What tests of products share."""

import pytest
import torch

from hvpspec.curvature import kernels


@pytest.fixture
def wrong_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    """What traces make of products of matrices is twice as large."""
    mm = torch.ops.aten.mm.default
    monkeypatch.setitem(kernels.FASTER, mm, lambda A, B: 2 * mm(A, B))
