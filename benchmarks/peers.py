"""Other libraries' Hessian products and densities, through their public functions."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp, vmap

from benchmarks.networks import Problem
from hvpspec import spectral_measure
from hvpspec.linalg import SymmetricOperator

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from curvlinops import HessianLinearOperator, lanczos_approximate_spectrum
    from hessian_eigenthings import HessianOperator as EigenthingsOperator
    from hessian_eigenthings import spectral_density
    from pyhessian import hessian as PyHessian

Batches = list[tuple[Tensor, Tensor]]
#: Ways to multiply blocks. `torch.func.hessian` goes the second, with all unit vectors at once.
BLOCKS = ("curvlinops", "torch.func, forward over reverse", "torch.func, reverse over reverse")
#: Multiplies a block of columns, shape (n, k).
Matmat = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Peer:
    """A rival.

    Attributes:
        name: of the library.
        matmat: multiplies a block of columns, shape (n, k).
        density: runs a stochastic Lanczos density with so many probes and steps.
        block_density: the same by our Lanczos on blocks, where the library's own takes one vector
            at a time though its products take blocks.
    """

    name: str
    matmat: Matmat
    density: Callable[[int, int], object]
    block_density: Callable[[int, int], object] | None = None


def peers(problem: Problem, batches: Batches) -> list[Peer]:
    """All rivals on the same data, at the setting that is fastest for them."""
    model = problem.model
    return [
        _pyhessian(model, batches),
        _curvlinops(model, batches),
        _eigenthings(model, batches),
        _torch_func(model, batches),
    ]


def block_products(problem: Problem, batches: Batches) -> dict[str, Matmat]:
    """The ways to multiply blocks with which others assemble a Hessian, by their names."""
    model = problem.model
    ways = (
        _curvlinops_matmat(_curvlinops_operator(model, batches)),
        _torch_func_matmat(model, batches),
        _torch_func_matmat(model, batches, forward=False),
    )
    return dict(zip(BLOCKS, ways, strict=True))


def _columns(multiply: Callable[[Tensor], Tensor]) -> Matmat:
    return lambda V: torch.stack([multiply(v) for v in V.T], 1)


def _pyhessian(model: nn.Module, batches: Batches) -> Peer:
    # PyHessian 0.1 calls torch.eig, which is gone; its meaning for a symmetric matrix remains.
    def eig(T: Tensor, eigenvectors: bool) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(T)
        return torch.stack([values, torch.zeros_like(values)], 1), vectors

    torch.eig = eig
    single = {"data": batches[0]} if len(batches) == 1 else {"dataloader": batches}
    peer = PyHessian(model, nn.CrossEntropyLoss(), cuda=False, **single)
    shapes = [p.shape for p in peer.params]

    def multiply(v: Tensor) -> Tensor:
        parts = torch.split(v, [s.numel() for s in shapes])
        vector = [part.view(s) for part, s in zip(parts, shapes, strict=True)]
        if len(batches) == 1:  # its graph is made once and kept
            product = torch.autograd.grad(
                peer.gradsH, peer.params, grad_outputs=vector, retain_graph=True
            )
        else:
            _, product = peer.dataloader_hv_product(vector)
        return torch.cat([part.reshape(-1) for part in product]).detach()

    return Peer("PyHessian", _columns(multiply), lambda k, m: peer.density(iter=m, n_v=k))


class _Operator(SymmetricOperator):
    """A block product as an operator, for a library without a density."""

    _keeps_apart = True

    def __init__(self, n: int, matmat: Matmat) -> None:
        super().__init__(n, dtype=torch.float32, device="cpu")
        self._multiply = matmat

    def _matmat(self, V: Tensor) -> Tensor:
        return self._multiply(V.contiguous())


def _own_density(n: int, matmat: Matmat) -> Callable[[int, int], object]:
    generator = torch.Generator().manual_seed(0)
    return lambda k, m: spectral_measure(_Operator(n, matmat), k, m, generator=generator)


def _curvlinops(model: nn.Module, batches: Batches) -> Peer:
    operator = _curvlinops_operator(model, batches)
    matmat = _curvlinops_matmat(operator)

    def density(k: int, m: int) -> object:
        # With the boundaries given, which it would look for first.
        return lanczos_approximate_spectrum(operator, m, num_repeats=k, boundaries=(-1.0, 10.0))

    return Peer("curvlinops", matmat, density, _own_density(_size(model), matmat))


def _curvlinops_operator(model: nn.Module, batches: Batches) -> HessianLinearOperator:
    return HessianLinearOperator(
        model, nn.CrossEntropyLoss(), list(model.parameters()), batches, check_deterministic=False
    )


def _curvlinops_matmat(operator: HessianLinearOperator) -> Matmat:
    return lambda V: (operator @ V).detach()


def _size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _eigenthings(model: nn.Module, batches: Batches) -> Peer:
    def loss(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(net(batch[0]), batch[1])

    operator = EigenthingsOperator(model, batches, loss)

    def multiply(v: Tensor) -> Tensor:
        return operator.matvec(v).detach()

    def density(k: int, m: int) -> object:
        with contextlib.redirect_stdout(io.StringIO()):
            return spectral_density(operator, num_runs=k, lanczos_steps=m, seed=0)

    return Peer("hessian-eigenthings", _columns(multiply), density)


def _torch_func(model: nn.Module, batches: Batches) -> Peer:
    matmat = _torch_func_matmat(model, batches)
    return Peer("torch.func", matmat, _own_density(_size(model), matmat))


def _torch_func_matmat(model: nn.Module, batches: Batches, *, forward: bool = True) -> Matmat:
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())
    sizes = [p.numel() for p in parameters.values()]
    total = sum(len(x) for x, _ in batches)

    def matmat(V: Tensor) -> Tensor:
        parts = torch.split(V.T, sizes, 1)
        vectors = {
            name: part.reshape(-1, *p.shape)
            for (name, p), part in zip(parameters.items(), parts, strict=True)
        }
        product = torch.zeros_like(V)
        for x, y in batches:

            def loss(theta: dict[str, Tensor], x: Tensor = x, y: Tensor = y) -> Tensor:
                return F.cross_entropy(functional_call(model, {**theta, **buffers}, (x,)), y)

            gradient = grad(loss)
            if forward:

                def push(v: dict[str, Tensor], g: Callable[..., Any] = gradient) -> Any:
                    return jvp(g, (parameters,), (v,))[1]

                block = vmap(push)(vectors)
            else:
                pull = vjp(gradient, parameters)[1]
                (block,) = vmap(pull)(vectors)
            rows = torch.cat([part.flatten(1) for part in block.values()], 1)
            product += rows.T * (len(x) / total)
        return product

    return matmat
