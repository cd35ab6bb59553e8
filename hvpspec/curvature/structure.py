"""An upper bound on the Morse index that follows from the network's structure alone.

Where the outputs are piecewise affine in some parameters and the loss is convex in the outputs, the
Hessian in these parameters is a Gauss-Newton matrix, hence positive semi-definite, and there are at
most as many negative eigenvalues as other parameters. The softmax's blindness to a shift of all
logits adds directions in the last layer. Whether the outputs are piecewise affine is
read off the autograd graph. An operation that is not in the tables below counts as curved: what is
claimed is certain, what is not claimed is merely unknown.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Any

from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

from hvpspec.curvature.data import is_nested, tensors_in
from hvpspec.curvature.graph import is_used_once, nodes
from hvpspec.curvature.losses import Loss
from hvpspec.errors import InputError
from hvpspec.linalg.operator import IndexBound

# Operations that are piecewise linear in all their tensor arguments together. Their derivatives are
# locally constant, so the second derivatives that autograd computes vanish, also at a kink.
# "Relu0" stands for the node ReluBackward0.
# fmt: off
_PIECEWISE_LINEAR = frozenset(f"{op[:-1]}Backward{op[-1]}" for op in (
    # entries moved, copied, selected, put together or in another type
    "Alias0", "AsStrided0", "Cat0", "Clone0", "Diagonal0", "Embedding0", "Expand0", "Flip0",
    "Gather0", "Index0", "IndexAdd0", "IndexPut0", "IndexSelect0", "MaskedFill0", "MaskedFill1",
    "MaskedSelect0", "Permute0", "PixelShuffle0", "PixelUnshuffle0", "Repeat0", "ReshapeAlias0",
    "Roll0", "Scatter0", "Scatter1", "ScatterAdd0", "Select0", "Slice0", "Split0",
    "SplitWithSizes0", "Squeeze0", "Squeeze1", "Squeeze2", "Stack0", "T0", "ToCopy0", "Transpose0",
    "Tril0", "Triu0", "Unbind0", "Unfold0", "UnsafeView0", "Unsqueeze0", "View0", "Where0",
    # sums, multiples by a number, activations, comparisons
    "Abs0", "Add0", "Add1", "Amax0", "Amin0", "Clamp0", "Clamp1", "ClampMax0", "ClampMax1",
    "ClampMin0", "ClampMin1", "Cumsum0", "Div1", "Hardsigmoid0", "Hardtanh0", "LeakyRelu0",
    "LeakyRelu1", "Max0", "Max1", "Maximum0", "Mean0", "Mean1", "Min0", "Min1", "Minimum0", "Mul1",
    "Neg0", "Relu0", "Rsub0", "Rsub1", "Softshrink0", "Sub0", "Sub1", "Sum0", "Sum1", "Threshold0",
    # pooling, padding, resampling
    "AdaptiveAvgPool2D0", "AdaptiveAvgPool3D0", "AdaptiveMaxPool2D0", "AdaptiveMaxPool3D0",
    "AvgPool2D0", "AvgPool3D0", "Col2Im0", "ConstantPadNd0", "Im2Col0", "MaxPool2DWithIndices0",
    "MaxPool3DWithIndices0", "ReflectionPad1D0", "ReflectionPad2D0", "ReflectionPad3D0",
    "ReplicationPad1D0", "ReplicationPad2D0", "ReplicationPad3D0", "UpsampleBilinear2D0",
    "UpsampleLinear1D0", "UpsampleNearest1D0", "UpsampleNearest2D0", "UpsampleNearest3D0",
    "UpsampleTrilinear3D0",
))
# fmt: on

# How the other known operations take their tensor arguments, in the order of the node's edges:
# "+" linearly, "*" as a factor (linearly while the other factors are constant), "!" nonlinearly.
_ROLES = {
    f"{op}Backward0": roles
    for roles, ops in {
        "**": ("Bmm", "Dot", "Mm", "Mul", "Mv", "PreluKernel"),
        "***": ("Trilinear",),
        "+**": ("Addbmm", "Addcmul", "Addmm", "Addmv", "Addr", "Baddbmm"),
        "**+": ("Convolution", "Linear"),
        "!++": ("NativeGroupNorm", "NativeLayerNorm"),
        "+!": ("Div",),
    }.items()
    for op in ops
}
# Layers and parameters that a reason lists.
_MOST_NAMED = 4

_BATCH_NORMS = {f"{kind}BatchNormBackward0" for kind in ("Cudnn", "Miopen", "Native")}


@dataclass(frozen=True)
class FlatDirections:
    """Directions along which the outputs bend nowhere that the loss could see.

    Attributes:
        parameters: names of those in which, all together, the outputs are piecewise affine.
        shifted: name of the last layer's weight, if the loss does not change where the same vector
            is added to all of its rows; None where that is not known, or the weight is one of
            ``parameters``.
    """

    parameters: tuple[str, ...]
    shifted: str | None = None

    def common(self, other: FlatDirections) -> FlatDirections:
        """Those on two parts of the data."""
        names = tuple(name for name in self.parameters if name in other.parameters)
        return FlatDirections(names, self.shifted if self.shifted == other.shifted else None)


def flat_directions(
    loss: Loss, outputs: object, leaves: Mapping[str, Tensor], candidates: Iterable[str]
) -> FlatDirections:
    """Where the Hessian is certainly a Gauss-Newton matrix, if the loss is convex.

    Args:
        loss: of the outputs.
        outputs: what the network returned.
        leaves: tensors that they were computed from, by name.
        candidates: names of those to look at.
    """
    if not is_nested(outputs):  # tensors in an object are not seen
        return FlatDirections(())
    parameters = affine_together(tensors_in(outputs), {name: leaves[name] for name in candidates})
    shifted = last_weight(outputs, leaves) if ignores_shifts(loss.function) else None
    return FlatDirections(parameters, None if shifted in parameters else shifted)


def affine_in(outputs: Sequence[Tensor], leaves: Sequence[Tensor]) -> bool:
    """Whether ``outputs`` are piecewise affine in ``leaves`` jointly, judged on the autograd graph.

    The function judged is the one that autograd differentiates: what is detached is constant.

    Args:
        outputs: tensors of any shape, computed from ``leaves`` with gradients enabled.
        leaves: leaf tensors that require gradients.

    Returns:
        True if they certainly are; False if they are not, or not known to be.

    Raises:
        InputError: one of ``leaves`` is not a leaf tensor that requires gradients.

    Reference:
        N. N. Schraudolph, Fast curvature matrix-vector products for second-order gradient descent,
        Neural Computation 14 (2002): the Gauss-Newton matrix of a convex loss.

    Example:
        >>> import torch
        >>> x, W, V = torch.ones(3, 4), torch.ones(4, 5), torch.ones(5, 2)
        >>> _ = W.requires_grad_(), V.requires_grad_()
        >>> outputs = [torch.relu(x @ W) @ V]
        >>> affine_in(outputs, [W]), affine_in(outputs, [V]), affine_in(outputs, [W, V])
        (True, True, False)
    """
    return _affine_in_each(outputs, [leaves])[0]


def affine_together(outputs: Sequence[Tensor], parameters: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Find parameters in which, all together, the outputs are piecewise affine.

    They are tried one after the other, those of the largest module first, and kept where the
    outputs are still affine. There may be other such sets; each part of one is one.

    Args:
        outputs: tensors of any shape, computed from ``parameters`` with gradients enabled.
        parameters: distinct leaf tensors that require gradients, by name.

    Returns:
        Their names in the order of ``parameters``.

    Raises:
        InputError: one of ``parameters`` is not a leaf tensor that requires gradients.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> affine_together([net(torch.ones(5, 4))], dict(net.named_parameters()))
        ('0.weight', '0.bias', '2.bias')
    """
    graph = nodes(outputs)
    if any(isinstance(node, BackwardCFunction) for node in graph):
        # A function in Python, such as a part that is computed anew in the backward pass, may hide
        # what it takes.
        seen = {id(getattr(node, "variable", None)) for node in graph}
        parameters = {name: leaf for name, leaf in parameters.items() if id(leaf) in seen}
    if affine_in(outputs, list(parameters.values())):
        return tuple(parameters)
    sizes: dict[str, int] = {}
    for name, leaf in parameters.items():
        module = name.rpartition(".")[0]
        sizes[module] = sizes.get(module, 0) + leaf.numel()
    largest_first = sorted(
        parameters, key=lambda name: (sizes[name.rpartition(".")[0]], parameters[name].numel())
    )[::-1]
    alone = _affine_in_each(outputs, [[parameters[name]] for name in largest_first])
    kept: list[str] = []
    for name, affine in zip(largest_first, alone, strict=True):
        if affine and affine_in(outputs, [parameters[other] for other in (*kept, name)]):
            kept.append(name)
    return tuple(name for name in parameters if name in kept)


def last_weight(outputs: object, parameters: Mapping[str, Tensor]) -> str | None:
    """Find W of a last layer ``a W^T + b``, used for nothing else, one row of it for each output.

    Args:
        outputs: what a network returned.
        parameters: distinct leaf tensors that require gradients, by name.

    Returns:
        Its name; None where there is no such layer, or not seen to be.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
        >>> last_weight(net(torch.ones(5, 4)), dict(net.named_parameters()))
        '2.weight'
    """
    if not isinstance(outputs, Tensor) or outputs.ndim != 2 or outputs.grad_fn is None:
        return None
    node = outputs.grad_fn
    if node.name() not in ("AddmmBackward0", "MmBackward0"):
        return None
    transposed = node.next_functions[-1][0]
    if transposed is None or transposed.name() != "TBackward0":
        return None
    leaf = getattr(transposed.next_functions[0][0], "variable", None)
    for name, parameter in parameters.items():
        if parameter is leaf:
            return name if is_used_once([outputs], parameter) else None
    return None


def ignores_shifts(loss: object) -> bool:
    """Whether a PyTorch loss certainly stays the same where all outputs of an example are shifted.

    Args:
        loss: a loss module of ``torch.nn``; a subclass may compute anything and is not known.

    Example:
        >>> ignores_shifts(nn.CrossEntropyLoss()), ignores_shifts(nn.MSELoss())
        (True, False)
    """
    return type(loss) is nn.CrossEntropyLoss and _is_untouched(loss)  # log_softmax ignores them


def _is_untouched(loss: object) -> bool:
    """Whether a loss computes what its class does: no hooks, and no forward of its own."""
    hooks = ("_forward_hooks", "_forward_pre_hooks")
    return "forward" not in vars(loss) and not any(getattr(loss, name, None) for name in hooks)


def is_convex_at(loss: Loss, outputs: object, targets: object) -> bool:
    """Whether a loss is certainly convex in the outputs, by declaration or because PyTorch's is."""
    return loss.convex or is_convex(loss.function, outputs, targets)


def is_convex(loss: object, outputs: object, targets: object) -> bool:
    """Whether a PyTorch loss is certainly convex in the outputs, all of them jointly.

    Args:
        loss: a loss module of ``torch.nn``; a subclass may compute anything and is not known.
        outputs: the loss's first argument.
        targets: the loss's second argument; some losses are convex for certain targets only.

    Returns:
        True if it certainly is; False if it is not, or not known to be.

    Example:
        >>> import torch
        >>> is_convex(nn.CrossEntropyLoss(), torch.zeros(2, 3), torch.tensor([0, 2]))
        True
    """
    condition = _CONVEX_IF.get(type(loss))
    if condition is None or not _is_untouched(loss):
        return False
    if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
        return False
    # Targets that carry gradients may move with the outputs.
    return not targets.requires_grad and condition(loss, targets)


def index_bound(shapes: Mapping[str, Sequence[int]], found: FlatDirections) -> IndexBound:
    """Bound the index of the Hessian of a loss that is convex in the outputs.

    Along ``parameters`` the outputs' second derivative is zero. Along a shift of all rows of the
    last weight, and mixed with ``parameters``, it is the same in all outputs, and the loss's
    gradient, whose entries add up to zero, does not see it. In these directions together the
    Hessian is thus a Gauss-Newton matrix.

    Args:
        shapes: of all parameters, by name.
        found: the directions, on all of the data.

    Returns:
        The number of parameters without these directions, and the reason for it.

    Reference:
        R. A. Horn and C. R. Johnson, Matrix Analysis, 2nd ed., Theorem 4.3.28: the eigenvalues of
        a principal submatrix interlace.

    Example:
        >>> shapes = {"0.weight": (10, 784), "0.bias": (10,), "2.weight": (10, 10), "2.bias": (10,)}
        >>> index_bound(shapes, FlatDirections(("0.weight", "0.bias", "2.bias"), "2.weight")).upper
        90
    """
    n = sum(map(math.prod, shapes.values()))
    if not found.parameters:
        return IndexBound(n, 0, "The outputs are not known to be piecewise affine in any layer.")
    affine = sum(math.prod(shapes[name]) for name in found.parameters)
    reason = (
        f"The loss is convex in the outputs, which are piecewise affine in the {affine:,}"
        f" parameters of {_named(found.parameters, shapes)} together"
    )
    shifts = 0
    if found.shifted is not None:
        shifts = shapes[found.shifted][1]
        reason += (
            f", and blind to equal shifts of all rows of {found.shifted!r} ({shifts:,} directions)"
        )
    return IndexBound(
        upper=n - affine - shifts,
        psd_dim=affine + shifts,
        reason=f"{reason}, so the Hessian is positive semi-definite on these.",
    )


def _named(names: Sequence[str], shapes: Mapping[str, Sequence[int]]) -> str:
    """Name some parameters, by their module where all of its parameters are among them."""
    modules: dict[str, list[str]] = {}
    for name in shapes:
        modules.setdefault(name.rpartition(".")[0], []).append(name)
    told: dict[str, None] = {}
    for name in names:
        module = name.rpartition(".")[0]
        told[module if module and set(modules[module]) <= set(names) else name] = None
    first = [repr(name) for name in list(told)[:_MOST_NAMED]]
    others = len(told) - len(first)
    return ", ".join(first) + (f" and {others} more" if others else "")


def _affine_in_each(outputs: Sequence[Tensor], groups: Sequence[Sequence[Tensor]]) -> list[bool]:
    """Answer ``affine_in`` for each group of leaves in one walk; bit ``g`` means group ``g``."""
    groups_of_leaf: dict[int, int] = {}
    for g, leaves in enumerate(groups):
        for leaf in leaves:
            if not (leaf.is_leaf and leaf.requires_grad):
                raise InputError(
                    f"expected leaf tensors that require gradients, got is_leaf={leaf.is_leaf} and"
                    f" requires_grad={leaf.requires_grad}; call .detach().requires_grad_() first"
                )
            groups_of_leaf[id(leaf)] = groups_of_leaf.get(id(leaf), 0) | 1 << g

    depends: dict[Node | None, int] = {None: 0}
    curved = 0
    for node in nodes(outputs):
        arguments = [depends[argument] for argument, _ in node.next_functions]
        if arguments:
            depends[node] = reduce(or_, arguments)
            curved |= _curved_in(node, arguments)
        else:  # the gradient accumulator of a leaf
            depends[node] = groups_of_leaf.get(id(getattr(node, "variable", None)), 0)
    return [not curved >> g & 1 for g in range(len(groups))]


def _curved_in(node: Node, arguments: Sequence[int]) -> int:
    """Return the groups in which ``node`` may not be affine, given those of its arguments."""
    name = node.name()
    if name == "AbsBackward0" and node._saved_self.is_complex():  # type: ignore[attr-defined]
        return reduce(or_, arguments)  # the modulus is curved
    if name in _PIECEWISE_LINEAR:
        return 0
    roles = _ROLES.get(name, "")
    if name in _BATCH_NORMS:
        # The statistics are constants in eval mode, and functions of the input in training.
        roles = "!++" if getattr(node, "_saved_training", True) else "**+"
    if len(roles) != len(arguments):
        return reduce(or_, arguments)
    factors = curved = 0
    for role, groups in zip(roles, arguments, strict=True):
        if role == "*":
            curved |= factors & groups
            factors |= groups
        elif role == "!":
            curved |= groups
    return curved


def _weights_nonnegative(loss: Any, targets: Tensor) -> bool:
    """Accept unless a weight of the loss is negative or NaN."""
    weights = (loss.weight, getattr(loss, "pos_weight", None))
    return all(w is None or bool((w >= 0).all()) for w in weights)


def _cross_entropy(loss: Any, targets: Tensor) -> bool:
    """Accept class indices and non-negative class probabilities."""
    nonnegative = not targets.is_floating_point() or bool((targets >= 0).all())
    return nonnegative and 0 <= loss.label_smoothing <= 1 and _weights_nonnegative(loss, targets)


def _binary_cross_entropy(loss: Any, targets: Tensor) -> bool:
    """Accept targets that are probabilities."""
    return bool(((targets >= 0) & (targets <= 1)).all()) and _weights_nonnegative(loss, targets)


def _always(loss: Any, targets: Tensor) -> bool:
    """Accept any targets."""
    return True


_CONVEX_IF: dict[type[Any], Callable[[Any, Tensor], bool]] = {
    nn.BCEWithLogitsLoss: _binary_cross_entropy,
    nn.CrossEntropyLoss: _cross_entropy,
    nn.HingeEmbeddingLoss: _always,
    nn.HuberLoss: _always,
    nn.KLDivLoss: _always,  # linear in the log-probabilities it takes
    nn.L1Loss: _always,
    nn.MSELoss: _always,
    nn.MultiLabelSoftMarginLoss: _weights_nonnegative,
    nn.NLLLoss: _always,  # linear, too
    nn.PoissonNLLLoss: lambda loss, targets: bool(loss.log_input),  # exp(x) - target x
    nn.SmoothL1Loss: _always,
    nn.SoftMarginLoss: _always,  # log(1 + exp(-target x))
}
