"""What an autograd graph tells."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node
from torch.utils.weak import WeakTensorKeyDictionary

from hvpspec.errors import InputError, NotDifferentiableError


def nodes(outputs: Iterable[Tensor]) -> list[Node]:
    """Every node of the graph that leads to some tensors, once, after those of its arguments."""
    order: list[Node] = []
    seen: set[Node] = set()
    stack = [(output.grad_fn, False) for output in outputs]
    while stack:
        node, arguments_done = stack.pop()
        if node is None:
            continue
        if arguments_done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((argument, False) for argument, _ in node.next_functions)
    return order


def is_used_once(outputs: Iterable[Tensor], leaf: Tensor) -> bool:
    """Whether a leaf, or its transpose, enters one operation on the way to some tensors."""
    consumers: dict[Node, list[Node]] = {}
    for node in nodes(outputs):
        for following, _ in node.next_functions:
            if following is not None:
                consumers.setdefault(following, []).append(node)
    found = [node for node in consumers if getattr(node, "variable", None) is leaf]
    while len(found) == 1:
        if len(consumers[found[0]]) != 1:
            return False
        found = consumers[found[0]]
        if found[0].name() != "TBackward0":
            return True
    return False


def foreign_leaves(loss: Tensor) -> list[Tensor]:
    """The tensors at the beginning of a graph by which it can be differentiated."""
    found = (getattr(node, "variable", None) for node in nodes([loss]))
    return [leaf for leaf in found if isinstance(leaf, Tensor)]


def has_own_backward(loss: Tensor) -> bool:
    """Whether a graph holds a function whose derivative is written out in Python, or a hook's."""
    return any(isinstance(node, BackwardCFunction) for node in nodes([loss]))


#: The parameters that were handed to models in the place of their own, as far as they still exist.
HANDED = WeakTensorKeyDictionary()


def refuse_earlier_leaves(loss: Tensor, leaves: Iterable[Tensor]) -> None:
    """Raise where a loss depends on parameters that were handed to the model on an earlier pass.

    Args:
        loss: on some examples.
        leaves: the parameters of this pass.

    Raises:
        InputError: the model keeps something computed from parameters.
    """
    own = {id(leaf) for leaf in leaves}
    if any(id(leaf) not in own and leaf in HANDED for leaf in foreign_leaves(loss)):
        raise InputError(
            "the network keeps a tensor that was computed from parameters on an earlier pass; "
            "clear such caches in the forward pass, or call model.train() if that switches them off"
        )


def refuse_known_faults(ends: Iterable[Tensor]) -> None:
    """Raise where a graph holds a function whose derivatives are known to be missing or wrong.

    PyTorch puts an error node behind a function that was declared differentiable only once, but one
    that leads nowhere: asked for the derivative by given tensors it is never run, and its share
    would be missing without a word.
    """
    for node in nodes(ends):
        name = node.name().rpartition("::")[2]
        if name in ("Error", "DelayedError"):
            raise NotDifferentiableError(
                "the network contains a function marked once_differentiable, so that its second "
                "derivative does not exist; replace it by one PyTorch can differentiate twice"
            )
        if name.startswith("WeightNormInterface"):
            raise NotDifferentiableError(
                "PyTorch's second derivative of weight_norm is wrong; remove the parametrisation "
                "(torch.nn.utils.parametrize.remove_parametrizations) or write g * v / v.norm()"
            )
        if name.startswith("BinaryCrossEntropyBackward"):
            raise NotDifferentiableError(
                "PyTorch's second derivative of binary_cross_entropy is wrong where a sigmoid "
                "saturates; use binary_cross_entropy_with_logits on the logits"
            )
        if name == "CheckpointFunctionBackward":
            raise NotDifferentiableError(
                "a reentrant checkpoint hides parameters from torch.autograd.grad; pass "
                "use_reentrant=False to torch.utils.checkpoint.checkpoint"
            )
        if getattr(node, "_saved_scale_grad_by_freq", False) is True:
            raise NotDifferentiableError(
                "an embedding scales its gradient by frequency, which is then not the loss's; "
                "leave out scale_grad_by_freq=True"
            )
