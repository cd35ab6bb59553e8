"""Lipschitz constants of a Hessian: proved from a network's layers, or estimated from products.

The Lipschitz constant K of H on a ball is the supremum of ``|D^3 L[v, v, v]|`` over its points and
all unit vectors v. For a chain of layers it is bounded layer by layer. For each example, let a be a
layer's value as a function of the selected parameters, and ``a0, a1, a2, a3`` bounds on the norms
of a and of its first three derivatives, at all points of the ball. Norms are Euclidean; those of
derivatives are suprema over unit vectors, attained on the diagonal ``v = u = w`` (Banach). Along v,
of which the part in this layer has norm s and the rest c, ``s^2 + c^2 = 1``:

- affine, ``z = W a + b``, with ``W' = |W|`` plus the radius if W is selected: ``|Dz| <= |dW a + db|
  + W' a1 c``, ``D^2 z = 2 dW Da + W D^2 a``, ``D^3 z = 3 dW D^2 a + W D^3 a``. Since ``2 s c <= 1``
  and ``3 s c^2 <= 2 / sqrt(3)``::

      z1^2 = a0^2 + 1 + (W' a1)^2,   z2 = a1 + W' a2,   z3 = 2/sqrt(3) a2 + W' a3

  Weights that are applied at several places, as in a convolution: b stands at p places, and
  ``|dW a| <= sqrt(o) |dW| a0`` where an entry of a lies in at most o windows. So 1 becomes p, a
  radius and each term with dW gets a factor sqrt(o). What is not selected contributes no such term.
- activation, ``a = phi(z)``, with ``ck = sup |phi^(k)|``; ``|x y| <= |x| |y|`` entry by entry::

      a1 = c1 z1,   a2 = c2 z1^2 + c1 z2,   a3 = c3 z1^3 + 3 c2 z1 z2 + c1 z3

- loss, with ``lk >= |D^k l|`` on the ball:
  ``D^3 (l o z) = l'''(Dz, Dz, Dz) + 3 l''(Dz, D^2 z) + l' D^3 z`` is at most
  ``l3 z1^3 + 3 l2 z1 z2 + l1 z3``. These are added up over the examples, as the losses are.

Each is bounded in two ways, of which the smaller counts: as a vector, with spectral norms, and
entry by entry, with absolute values of W's entries and ``phi^(k)`` at each entry. The second makes
bounds of convolutions useful: most entries of an image's layers are small or saturated, and
``|x y|`` is at most ``max |x_i| |y|``.

Where the ball is small, a0, ``phi^(k)`` and the lk are best known from the values at its centre. A
bound on the spread of each value, its distance from what was computed there, is carried along, and
holds the rounding error, too: ``|W' a' + b' - W a - b| <= r sqrt(a0^2 + 1) + |W| spread(a)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from hvpspec.curvature.data import Batch
from hvpspec.curvature.stage import stage
from hvpspec.errors import InputError, NonFiniteError, type_and_line
from hvpspec.linalg.probes import draw_probes

if TYPE_CHECKING:
    from hvpspec.curvature.objective import Objective
    from hvpspec.landscape.landscapes import Landscape

#: By what the largest third derivative that was found is multiplied. It was found from a few starts
#: at one point, so that it may be a local maximum and may grow within the ball. A factor costs
#: little: the proof fails for lack of a constant only where h is near 1/2, and h is usually tiny.
ESTIMATE_SAFETY = 10.0

# Rounding errors of the bounds themselves. Nothing cancels in them, so their relative error is at
# most the unit round-off times the number of operations in a row, 1e9 of which are allowed for.
_MARGIN = 1e-6
_EPS = torch.finfo(torch.float64).eps
# Error of an activation's derivatives by autograd, relative to their suprema; they cancel a little.
_ROUNDING = 1e-10

# Beyond this many entries the Fourier transform of a kernel is not worth its memory.
_MOST_FREQUENCIES = 2**25


@dataclass(frozen=True)
class _Layer:
    """A layer of a chain.

    Attributes:
        name: by which a message calls it.
        apply: from its input to its output.
        moves_weight: whether the weight is selected.
        moves_bias: whether there is a bias, and it is selected.
    """

    name: str
    apply: Callable[[Tensor], Tensor]
    moves_weight: bool = False
    moves_bias: bool = False


class _Size(NamedTuple):
    """Bounds on a value, or on its derivative along any unit vector, example by example.

    Attributes:
        norm: of the norm, shape (N,).
        entries: of the absolute value of each entry, shape (N, ...).
    """

    norm: Tensor
    entries: Tensor


@dataclass(frozen=True)
class _Bounds:
    """What is known of a value on the ball, example by example.

    Attributes:
        value: as computed at the centre, shape (N, ...).
        spread: how far the value may be from that anywhere on the ball, shape (N,).
        first: its derivative.
        second: its second derivative.
        third: its third derivative.
    """

    value: Tensor
    spread: Tensor
    first: _Size
    second: _Size
    third: _Size

    @property
    def size(self) -> _Size:
        """Of the value itself."""
        entries = self.value.abs() + _beside(self.spread, self.value)
        return _Size(_norms(self.value) + self.spread, entries)


@dataclass(frozen=True)
class _Linear:
    """Bounds on a linear map W.

    Attributes:
        norm: its spectral norm.
        row: the norm of a row.
        overlaps: for a convolution, in how many windows an entry of the input lies.
    """

    norm: float
    row: float
    overlaps: float = 1.0


# The linear parts of layers, by their identity and the shape of an input.
_Maps = dict[tuple[int, torch.Size], _Linear]


# ---------------------------------------------------------------------------------------------
# What is proved


def proved_lipschitz(objective: Objective, theta: Tensor, radius: float) -> float:
    """A Lipschitz constant of the Hessian of the loss on a ball.

    It is proved for chains of ``Linear``, ``Conv2d``, average pooling, ``Flatten``, ``Identity``,
    ``Dropout`` in evaluation mode and the activations of :func:`derivative_bounds`, each with
    parameters of its own, ended by ``CrossEntropyLoss`` or ``MSELoss``. A forward method of one's
    own is fine if ``torch.fx`` traces it to such a chain. The l2 term has a constant Hessian and
    adds nothing.

    Args:
        objective: the function.
        theta: the ball's centre, shape (n,).
        radius: of the ball.

    Returns:
        K with ``||H(x) - H(y)||_2 <= K ||x - y||`` for all x and y in the ball, H the Hessian by
        the selected parameters.

    Raises:
        InputError: the radius is negative or not finite; or no bound is proved, and the message
            names what stands in the way.
        NonFiniteError: the point or a value of the network there is not finite.

    Example:
        ``L(w) = (w - 1)^2`` has a constant Hessian, the composition with a tanh has not:

        >>> from hvpspec.curvature.objective import Objective
        >>> data, theta = (torch.ones(1, 1), torch.ones(1, 1)), torch.zeros(1)
        >>> line = nn.Linear(1, 1, bias=False)
        >>> proved_lipschitz(Objective(line, nn.MSELoss(), data), theta, 1.0)
        0.0
        >>> bent = nn.Sequential(line, nn.Tanh())
        >>> 4 < proved_lipschitz(Objective(bent, nn.MSELoss(), data), theta, 1e-9) < 9
        True
        >>> broken = nn.Sequential(line, nn.ReLU())
        >>> proved_lipschitz(Objective(broken, nn.MSELoss(), data), theta, 1.0)
        Traceback (most recent call last):
            ...
        hvpspec.errors.InputError: no bound is proved for layer '1' (ReLU)
    """
    if not (math.isfinite(radius) and radius >= 0):
        raise InputError(f"radius must be a finite number of at least 0, got {radius}")
    layers = _chain(objective)
    point = objective.at(theta)
    # In float32 the centre may have been rounded; the ball around it holds the one that is meant.
    radius += _norm(theta.double() - theta.to(objective.dtype).double())

    def share() -> float:
        """What the data of this process contribute."""
        leaves = point.leaves()
        maps: _Maps = {}
        total = 0.0
        with point.chunks() as chunks:
            for k, batch in chunks:
                if weight := point.share(k):
                    own = _on_examples(objective, layers, leaves, batch, radius, maps)
                    total += abs(weight) * own
        return total

    with point.ranks.together():
        constant = point.within_memory(share)
    constant = point.ranks.sum(constant) * (1 + _MARGIN)
    if math.isnan(constant):
        raise NonFiniteError("the point, or a value of the network there, is NaN or infinite")
    return constant


def derivative_bounds(activation: nn.Module) -> tuple[float, float, float, float]:
    """The suprema of the absolute values of an activation's first four derivatives.

    Args:
        activation: ``Tanh``, ``Sigmoid``, ``Softplus``, ``LogSigmoid``, ``SiLU`` or ``GELU``.

    Raises:
        InputError: it is another module.

    Example:
        >>> derivative_bounds(nn.Sigmoid())
        (0.25, 0.09622504486493763, 0.125, 0.12768393)
    """
    peak = 2 / (2 * math.pi) ** 0.5
    if type(activation) is nn.Tanh:
        # With t = tanh and s = 1 - t^2: s, -2 t s, s (6 t^2 - 2), 8 t s (2 - 3 t^2), extremal at
        # t^2 = 0, 1/3, 0 and (15 - sqrt(105)) / 30.
        return 1.0, 4 / 27**0.5, 2.0, 4.08588551
    sigmoid = 1 / 4, 1 / 108**0.5, 1 / 8, 0.12768393  # it is (1 + tanh(x / 2)) / 2
    if type(activation) is nn.Sigmoid:
        return sigmoid
    if type(activation) is nn.LogSigmoid:  # its derivative is sigmoid(-x)
        return 1.0, *sigmoid[:3]
    if type(activation) is nn.Softplus:  # its derivative is sigmoid(beta x)
        beta = abs(float(activation.beta))
        return 1.0, beta * sigmoid[0], beta**2 * sigmoid[1], beta**3 * sigmoid[2]
    if type(activation) is nn.GELU and activation.approximate == "none":
        # With the normal density p: Phi + x p, (2 - x^2) p, (x^3 - 4 x) p, (7 x^2 - x^4 - 4) p,
        # extremal at x^2 = 2, 0, (7 - sqrt(33)) / 2 and 0.
        return 1.12890415, peak, 0.77876964, 2 * peak
    # The next two have no closed form: maxima by 30 digits, at 1.42, 0, 0.79 and 0 (2.40, 0, 1.03
    # and 0), rounded up.
    if type(activation) is nn.GELU:
        return 1.12899307, peak, 0.7766915, 1.60366746
    if type(activation) is nn.SiLU:
        return 1.09983933, 0.5, 0.30818152, 0.5
    raise InputError(f"no bound is proved for {type(activation).__name__}")


# ---------------------------------------------------------------------------------------------
# The network as a chain of layers

_AFFINE: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv2d)
_POOLING: tuple[type[nn.Module], ...] = (nn.AvgPool2d, nn.AdaptiveAvgPool2d)
_ACTIVATIONS: tuple[type[nn.Module], ...] = (
    nn.Tanh, nn.Sigmoid, nn.LogSigmoid, nn.Softplus, nn.GELU, nn.SiLU,
)  # fmt: skip
# These leave every example's entries as they are.
_UNCHANGED: tuple[type[nn.Module], ...] = (
    nn.Flatten, nn.Unflatten, nn.Identity, nn.Dropout, nn.Dropout2d,
)  # fmt: skip
_RESHAPING = {torch.flatten, torch.reshape, "flatten", "reshape", "view", "contiguous"}

# Functions that do what a module does, with the same further arguments.
_MODULES: Mapping[Any, type[nn.Module]] = {
    torch.tanh: nn.Tanh,
    "tanh": nn.Tanh,
    torch.sigmoid: nn.Sigmoid,
    "sigmoid": nn.Sigmoid,
    F.logsigmoid: nn.LogSigmoid,
    F.softplus: nn.Softplus,
    F.gelu: nn.GELU,
    F.silu: nn.SiLU,
    F.avg_pool2d: nn.AvgPool2d,
    F.adaptive_avg_pool2d: nn.AdaptiveAvgPool2d,
}


def _chain(objective: Objective) -> list[_Layer]:
    """The layers of a network, of which each takes what the one before it returns.

    Raises:
        InputError: the network is none, or a layer or the loss is not known.
    """
    loss = objective.loss.function
    if objective.source != "known" or type(loss) not in (nn.CrossEntropyLoss, nn.MSELoss):
        given = loss if isinstance(loss, nn.Module) else objective.arguments[1]
        name = getattr(given, "__name__", type(given).__name__)
        raise InputError(
            f"no bound is proved for the loss {name}, but for CrossEntropyLoss and MSELoss"
        )
    if objective.is_sharded:
        raise InputError("no bound is proved for a network whose parameters are sharded")
    modules = {**dict(objective.model.named_modules()), "the loss": loss}
    for name, module in modules.items():
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            raise InputError(f"{name!r} ({type(module).__name__}) has hooks or a replaced forward")

    # In a container, a network that is itself one layer is traced as a layer.
    whole = nn.Sequential(objective.model)
    with stage(objective, 0):
        try:
            graph = fx.Tracer().trace(whole)
        except Exception as error:
            raise InputError(
                f"torch.fx cannot trace the network to a chain of layers ({type_and_line(error)})"
            ) from error
        layers: list[_Layer] = []
        seen: set[int] = set()
        before: fx.Node | None = None
        for node in graph.nodes:
            if node.op == "output":
                if node.args != (before,):
                    raise InputError("the network does not return the last layer's output alone")
                return layers
            if node.op == "placeholder":
                if before is not None:
                    raise InputError("the network takes several inputs")
            elif node.op == "get_attr":
                name = str(node.target).removeprefix("0.")
                raise InputError(f"{name!r} is used outside of a layer of torch.nn")
            else:
                layer = _layer(whole, node)
                if node.all_input_nodes != [before] or node.args[:1] != (before,):
                    raise InputError(f"{layer.name} does not take the output of one layer alone")
                layers.append(_with_parameters(layer, objective, seen))
            before = node
    raise AssertionError("a graph ends with its output")


def _layer(whole: nn.Module, node: fx.Node) -> _Layer:
    """The layer that a node of the graph calls."""
    if node.op == "call_module":
        module = whole.get_submodule(str(node.target))
        name = f"layer {str(node.target).removeprefix('0.')!r} ({type(module).__name__})"
        if type(module) not in (*_AFFINE, *_POOLING, *_ACTIVATIONS, *_UNCHANGED):
            raise InputError(f"no bound is proved for {name}")
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p:
            raise InputError(f"{name} is in training mode")
        return _Layer(name, module)
    name = f"the call of {getattr(node.target, '__name__', node.target)}()"
    if node.target in _MODULES:
        return _Layer(name, _MODULES[node.target](*node.args[1:], **node.kwargs))
    if node.target in _RESHAPING:
        function: Any = node.target
        if isinstance(function, str):
            function = getattr(Tensor, function)
        return _Layer(name, lambda x: function(x, *node.args[1:], **node.kwargs))
    if node.target is F.dropout and node.kwargs.get("training") is False:
        return _Layer(name, nn.Identity())
    raise InputError(f"no bound is proved for {name}")


def _with_parameters(layer: _Layer, objective: Objective, seen: set[int]) -> _Layer:
    """A layer that knows which of its parameters are selected."""
    module: Any = layer.apply
    if type(module) not in _AFFINE:
        return layer
    if getattr(module, "padding_mode", "zeros") != "zeros":
        raise InputError(f"no bound is proved for {layer.name} with padding_mode other than zeros")
    names = {id(parameter): name for name, parameter in objective.parameters().items()}
    selected = []
    for parameter in (module.weight, module.bias):
        if parameter is not None and (id(parameter) in seen or parameter.is_complex()):
            raise InputError(f"{layer.name} has parameters that are shared or complex")
        seen.add(id(parameter))
        selected.append(parameter is not None and names[id(parameter)] in objective.space.names)
    seen.discard(id(None))
    return replace(layer, moves_weight=selected[0], moves_bias=selected[1])


# ---------------------------------------------------------------------------------------------
# The bounds, layer by layer


def _on_examples(
    objective: Objective,
    layers: list[_Layer],
    leaves: Mapping[str, Tensor],
    batch: Batch,
    radius: float,
    maps: _Maps,
) -> float:
    """Bound the third derivative of the loss on some examples.

    Args:
        objective: the function.
        layers: of the network.
        leaves: the selected parameters at the ball's centre.
        batch: the examples.
        radius: of the ball.
        maps: of layers, as far as they are known from other examples.

    Raises:
        InputError: a value has a shape, or an activation an input, for which nothing is proved.
    """
    inputs = [*batch.args, *batch.kwargs.values()]
    if len(inputs) != 1 or not isinstance(inputs[0], Tensor) or not inputs[0].is_floating_point():
        raise InputError("the network's input is not one tensor of real numbers")
    tensors = objective.tensors(leaves)
    wide = {name: t.detach().double() for name, t in tensors.items()}
    with torch.no_grad(), objective.placed(wide):
        x = inputs[0].double()
        zero = _Size(x.new_zeros(len(x)), torch.zeros_like(x))
        bounds = _Bounds(x, zero.norm, zero, zero, zero)
        for layer in layers:
            bounds = _through(layer, bounds, radius, maps)
            if bounds.value.ndim == 0 or len(bounds.value) != len(x):
                raise InputError(f"{layer.name} does not keep the examples apart")
        l1, l2, l3 = _loss_bounds(objective.loss.function, bounds, batch.targets)
        z1, z2, z3 = bounds.first.norm, bounds.second.norm, bounds.third.norm
        total = (l3 * z1**3 + 3 * l2 * z1 * z2 + l1 * z3).sum()
        weight = objective.loss.batch_weight(bounds.value, batch.targets, len(x))
    return float(total) / abs(weight) if weight else 0.0


def _through(layer: _Layer, a: _Bounds, radius: float, maps: _Maps) -> _Bounds:
    """The bounds behind a layer from those before it."""
    module: Any = layer.apply
    if isinstance(module, _ACTIVATIONS):
        return _activated(layer, a)
    if not isinstance(module, _AFFINE + _POOLING):
        return _reshaped(layer, a)
    if isinstance(module, _AFFINE) and a.value.ndim < (4 if isinstance(module, nn.Conv2d) else 2):
        raise InputError(f"{layer.name} is given an example without a dimension for the batch")
    key = id(module), a.value.shape[1:]
    if key not in maps:
        maps[key] = _linear_part(module, a.value[:1])
    if isinstance(module, _POOLING):
        return _pooled(layer, a, maps[key])
    return _affine(layer, a, radius, maps[key])


def _affine(layer: _Layer, a: _Bounds, radius: float, linear: _Linear) -> _Bounds:
    """Bounds behind ``W a + b``.

    Args:
        layer: a linear layer or a convolution.
        a: the bounds before it.
        radius: of the ball.
        linear: the norms of W at its centre.
    """
    module: Any = layer.apply
    W, b = module.weight, module.bias
    z = module(a.value)
    moves_W, moves_b = float(layer.moves_weight), float(layer.moves_bias)
    each, places = linear.overlaps**0.5, z[0].numel() / W.shape[0]
    absolute, ones = W.abs(), torch.ones_like(W)

    def applied(weight: Tensor, x: Tensor) -> Tensor:
        """``W x`` with another weight."""
        if isinstance(module, nn.Linear):
            return F.linear(x, weight)
        conv = module
        return F.conv2d(x, weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)

    def by_weight(x: _Size) -> _Size:
        """Of ``dW x``, where ``|dW|`` is 1: an entry is at most the norm of a window of x."""
        windows = applied(ones, x.entries**2).sqrt()
        return _size(moves_W * each * x.norm, moves_W * torch.minimum(_beside(x.norm, z), windows))

    def mapped(x: _Size) -> _Size:
        """Of ``W x``, W anywhere on the ball."""
        moved = by_weight(x)
        entries = torch.minimum(_beside(linear.row * x.norm, z), applied(absolute, x.entries))
        return _size(linear.norm * x.norm + radius * moved.norm, entries + radius * moved.entries)

    own, first, second, third = by_weight(a.size), *map(mapped, (a.first, a.second, a.third))
    mixed2, mixed3 = by_weight(a.first), by_weight(a.second)
    # A sum of k products, in any order, errs by (k + 1) u sum |W_ij a_j|.
    terms = each * _norm(W) * a.size.norm + (0 if b is None else places**0.5 * _norm(b))
    rounding = (W[0].numel() + 2) * _EPS * terms
    moved = (own.norm**2 + moves_b * places).sqrt()
    return _Bounds(
        z,
        radius * moved + linear.norm * a.spread + rounding,
        _size(
            (moved**2 + first.norm**2).sqrt(),
            (own.entries**2 + moves_b + first.entries**2).sqrt(),
        ),
        _size(mixed2.norm + second.norm, mixed2.entries + second.entries),
        _size(2 / 3**0.5 * mixed3.norm + third.norm, 2 / 3**0.5 * mixed3.entries + third.entries),
    )


def _pooled(layer: _Layer, a: _Bounds, linear: _Linear) -> _Bounds:
    """Bounds behind average pooling."""

    def mapped(x: _Size) -> _Size:
        return _size(linear.norm * x.norm, layer.apply(x.entries).abs())

    # It adds up no more than all entries.
    spread = linear.norm * (a.spread + a.value[0].numel() * _EPS * a.size.norm)
    return _Bounds(layer.apply(a.value), spread, *map(mapped, (a.first, a.second, a.third)))


def _reshaped(layer: _Layer, a: _Bounds) -> _Bounds:
    """Bounds behind a layer that changes no entry."""
    sizes = ((x.norm, layer.apply(x.entries)) for x in (a.first, a.second, a.third))
    return _Bounds(layer.apply(a.value), a.spread, *(_Size(*size) for size in sizes))


def _activated(layer: _Layer, z: _Bounds) -> _Bounds:
    """Bounds behind an activation."""
    module: Any = layer.apply
    if isinstance(module, nn.Softplus):
        # PyTorch's is linear beyond a threshold, where it jumps; on either side the bounds hold.
        near = (module.beta * z.value - module.threshold).abs().flatten(1).amin(1)
        if bool((near <= abs(module.beta) * z.spread).any()):
            raise InputError(f"an input of {layer.name} is at its threshold, where it jumps")
    with torch.enable_grad():
        x = z.value.detach().requires_grad_()
        value = slope = module(x.clone())  # it may write into its input
        # |phi^(k)| at each entry, anywhere on the ball: at most that at the centre and the next
        # derivative's supremum times the spread, and at most its own supremum.
        bounds = derivative_bounds(module)
        c: list[Tensor] = []
        for k in range(3):
            (slope,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
            here = slope.detach().abs() + _beside(
                bounds[k + 1] * z.spread + _ROUNDING * bounds[k], x
            )
            # NaN counts for nothing: that of GELU's third derivative where it vanishes, say.
            c.append(torch.fmin(here, here.new_tensor(bounds[k])))
    value = value.detach()
    # PyTorch's elementary functions are good to a few units in the last place.
    rounding = 8 * _EPS * (_norms(z.value) + _norms(value))
    z1, z2, z3 = z.first, z.second, z.third
    c1, bend = _largest(c[0]), c[1] * z1.entries
    twist = c[2] * z1.entries**2
    return _Bounds(
        value,
        c1 * z.spread + rounding,
        _size(c1 * z1.norm, c[0] * z1.entries),
        _size(_largest(bend) * z1.norm + c1 * z2.norm, bend * z1.entries + c[0] * z2.entries),
        _size(
            _largest(twist) * z1.norm + 3 * _largest(bend) * z2.norm + c1 * z3.norm,
            twist * z1.entries + 3 * bend * z2.entries + c[0] * z3.entries,
        ),
    )


def _size(norm: Tensor, entries: Tensor) -> _Size:
    """Bounds of which the norm is no larger than that of the entries."""
    return _Size(torch.minimum(norm, _norms(entries)), entries)


def _largest(x: Tensor) -> Tensor:
    """The largest entry of each example, shape (N,)."""
    return x.reshape(len(x), -1).amax(1)


def _beside(x: Tensor, entries: Tensor) -> Tensor:
    """A number for each example, shape (N,), in a shape that fits its entries."""
    return x.reshape(-1, *[1] * (entries.ndim - 1))


# ---------------------------------------------------------------------------------------------
# Norms


def _norm(x: Tensor) -> float:
    """The Euclidean norm of all entries."""
    return float(torch.linalg.vector_norm(x))


def _norms(x: Tensor) -> Tensor:
    """The Euclidean norm of each example, shape (N,)."""
    norms: Tensor = torch.linalg.vector_norm(x.reshape(len(x), -1), dim=1)
    return norms


def _spectral_norm(W: Tensor) -> float:
    """The largest spectral norm of matrices."""
    return float(torch.linalg.matrix_norm(W, 2).max())


def _linear_part(module: nn.Module, x: Tensor) -> _Linear:
    """Bound a layer's linear part.

    Args:
        module: a linear layer, a convolution or average pooling.
        x: one example of its input, with a dimension for the batch.
    """
    if isinstance(module, nn.Linear | nn.Conv2d):
        rows = module.weight.flatten(1)
        row = float(_norms(rows).max())
        if isinstance(module, nn.Linear):
            return _Linear(_spectral_norm(rows), row)
        norm, overlaps = _convolution_norm(module, x.shape[2:])
        return _Linear(norm, row, overlaps)
    # Of A with entries that are not negative, |A|^2 is at most the largest row sum times the
    # largest column sum (Schur's test), and these are the entries of A 1 and A^T 1.
    with torch.enable_grad():
        ones = torch.ones_like(x).requires_grad_()
        sums = module(ones)
        (columns,) = torch.autograd.grad(sums.sum(), ones)
    norm = float(sums.abs().max() * columns.abs().max()) ** 0.5
    return _Linear(norm, norm)


def _convolution_norm(conv: nn.Conv2d, shape: torch.Size) -> tuple[float, float]:
    """Bound the norm of a convolution of images, and count the windows that overlap.

    The entries of all windows together have norm at most ``sqrt(o) |a|``, and each is multiplied by
    the kernel as a matrix: the norm is at most ``sqrt(o)`` times that matrix's. It is also at most
    that of a circular convolution on an image so large that no window wraps around, of which this
    one's outputs, where not zero, are a part: the largest over its frequencies.

    Args:
        conv: the layer.
        shape: of an image.

    Returns:
        The bound, and o.
    """
    # The matrices that the groups of channels are multiplied by: (groups, out, in, height, width).
    K = conv.weight.reshape(conv.groups, -1, *conv.weight.shape[1:])
    with torch.enable_grad():
        ones = K.new_ones(1, 1, *shape).requires_grad_()
        window = K.new_ones(1, 1, *conv.kernel_size)
        sums = F.conv2d(ones, window, None, conv.stride, conv.padding, conv.dilation)
        (counts,) = torch.autograd.grad(sums.sum(), ones)
    overlaps = float(counts.max().round())
    norm = overlaps**0.5 * _spectral_norm(K.flatten(2))
    reach = [(k - 1) * d for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
    period = [n + more for n, more in zip(shape, reach, strict=True)]
    if conv.weight[..., 0, 0].numel() * math.prod(period) <= _MOST_FREQUENCIES:
        stretched = K.new_zeros(*K.shape[:3], *(more + 1 for more in reach))
        stretched[..., :: conv.dilation[0], :: conv.dilation[1]] = K
        symbol = torch.fft.rfft2(stretched, s=period).movedim((1, 2), (-2, -1))
        norm = min(norm, _spectral_norm(symbol))
    return norm, overlaps


# ---------------------------------------------------------------------------------------------
# The losses


def _loss_bounds(loss: Any, z: _Bounds, targets: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Bound the first three derivatives of the loss by the outputs, each of shape (N,).

    They are those of the sum over a batch, before it is divided.

    Raises:
        InputError: outputs and targets do not fit each other, or the loss.
    """
    if not isinstance(targets, Tensor):
        raise InputError("the targets are not one tensor")
    if isinstance(loss, nn.CrossEntropyLoss):
        return _cross_entropy_bounds(loss, z, targets)
    if targets.shape != z.value.shape:  # PyTorch would broadcast one against the other
        raise InputError(
            f"outputs have shape {tuple(z.value.shape)}, targets {tuple(targets.shape)}"
        )
    # |z - y|^2 has the derivatives 2 (z - y), 2 I, 0.
    residual = _norms(z.value - targets.double()) + z.spread
    return 2 * residual, torch.full_like(residual, 2), torch.zeros_like(residual)


# The largest third central moment of numbers that lie at most R apart is R^3 / (6 sqrt(3)), for two
# of them with probabilities (1 +- 1/sqrt(3)) / 2; the entries of a unit vector are sqrt(2) apart.
_THIRD_MOMENT = 2**1.5 / (6 * 3**0.5)


def _cross_entropy_bounds(
    loss: nn.CrossEntropyLoss, z: _Bounds, targets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Bound the derivatives of cross-entropies, of one or several rows of logits per example.

    With class weights, label smoothing and ignored or soft targets the loss of a row is ``sum_c q_c
    (logsumexp(z) - z_c)`` with constants q. Let S be their sum and p the softmax. The derivatives
    along v are ``<S p - q, v>``, S times the variance of v's entries under p, and S times their
    third central moment. For unit v the variance is at most 1/2, and at most ``2 max p_c (1 -
    p_c)`` (Gershgorin); the third moment at most 0.2722, and at most sqrt(2) times the variance.
    Each derivative changes by at most the next one's bound times the spread of the logits.
    """
    logits = z.value
    if logits.ndim < 2:
        raise InputError("the cross-entropy is given logits in no dimension of their own")
    C = logits.shape[1]
    if targets.is_floating_point():
        q, counted = targets.double(), torch.ones_like(logits[:, 0])
    else:
        counted = (targets != loss.ignore_index).double()
        classes = torch.where(targets == loss.ignore_index, 0, targets)
        q = F.one_hot(classes, C).movedim(-1, 1).double()
    if q.shape != logits.shape:
        raise InputError(f"logits have shape {tuple(logits.shape)}, targets {tuple(targets.shape)}")
    q = ((1 - loss.label_smoothing) * q + loss.label_smoothing / C) * counted[:, None]
    if loss.weight is not None:
        q = q * loss.weight.to(q).reshape(-1, *[1] * (q.ndim - 2))

    p = logits.softmax(1)
    # The rounding of a softmax is as if the logits were a little off.
    spread = z.spread + (C + 8) * _EPS * (1 + _norms(logits))
    spread = spread.reshape(-1, *[1] * (q.ndim - 2))
    total = q.sum(1)
    gradient: Tensor = torch.linalg.vector_norm(total[:, None] * p - q, dim=1)
    first = torch.minimum(gradient + total.abs() / 2 * spread, 2**0.5 * q.abs().sum(1))
    second = ((2 * p * (1 - p)).amax(1) + _THIRD_MOMENT * spread).clamp(max=1 / 2)
    third = (2**0.5 * second).clamp(max=_THIRD_MOMENT)
    # Over the rows of an example: sum_r l_r' D^3 z_r is at most the norm of all l_r' together.
    second, third = ((total.abs() * bound).reshape(len(q), -1) for bound in (second, third))
    return _norms(first), second.amax(1), third.amax(1)


# ---------------------------------------------------------------------------------------------
# What is estimated


def third_derivative(F: Landscape, theta: Tensor, v: Tensor) -> Tensor:
    """``D^3 f(theta)[v, v, .]`` by a central difference of products with the Hessian.

    Args:
        F: the landscape.
        theta: a point, shape (n,).
        v: a direction, shape (n,).

    Returns:
        Shape (n,), with a relative error of about 1e-10 where ``D^3 f`` is no smaller than H.

    Example:
        >>> from hvpspec.landscape.landscapes import FunctionLandscape
        >>> x = torch.tensor([1.0, 2.0], dtype=torch.float64)
        >>> F = FunctionLandscape(2, lambda x: x[0] ** 3 + x[0] * x[1] ** 2)
        >>> third_derivative(F, x, torch.tensor([1.0, 1.0], dtype=torch.float64))
        tensor([8.0000, 4.0000], dtype=torch.float64)
    """
    length = float(torch.linalg.vector_norm(v))
    if length == 0:
        return torch.zeros_like(v)
    u = v / length
    # The products' round-off eps |H| / t and the difference's own error t^2 |D^5 f| / 6 are about
    # the same for t = eps^(1/3), where derivatives of all orders are; their sum is eps^(2/3).
    t = torch.finfo(theta.dtype).eps ** (1 / 3)
    difference = F.hessian(theta + t * u) @ u - F.hessian(theta - t * u) @ u
    third: Tensor = difference * (length**2 / (2 * t))
    return third


def estimated_lipschitz(
    F: Landscape,
    theta: Tensor,
    *,
    generator: torch.Generator,
    num_starts: int = 3,
    num_steps: int = 10,
) -> float:
    """Estimate the Lipschitz constant of the Hessian around a point: nothing is proved by it.

    Args:
        F: the landscape.
        theta: the point, shape (n,).
        generator: the source of the starts.
        num_starts: random directions, from each of which v goes halfway to the direction of
            ``D^3 f[v, v, .]`` again and again.
        num_steps: of this iteration, each of two products.

    Returns:
        :data:`ESTIMATE_SAFETY` times the largest ``|D^3 f[v, v, v]|`` of all unit vectors v met.

    Reference:
        T. G. Kolda and J. R. Mayo, Shifted power method for computing tensor eigenpairs, SIAM J.
        Matrix Anal. Appl. 32 (2011).

    Example:
        >>> from hvpspec.landscape.landscapes import FunctionLandscape
        >>> F = FunctionLandscape(2, lambda x: x[0] ** 3 - 3 * x[0] * x[1] ** 2)  # at most 6
        >>> x, generator = torch.zeros(2, dtype=torch.float64), torch.Generator().manual_seed(0)
        >>> round(estimated_lipschitz(F, x, generator=generator), 3)
        60.0
    """
    starts = draw_probes(
        "gaussian", len(theta), num_starts, generator, dtype=theta.dtype, device=theta.device
    )
    largest = 0.0
    for start in starts.T:
        v = start / torch.linalg.vector_norm(start)
        for _ in range(num_steps):
            following = third_derivative(F, theta, v)
            slope, length = float(following @ v), float(torch.linalg.vector_norm(following))
            largest = max(largest, abs(slope))
            if length == 0:  # f is quadratic along this direction
                break
            # Halfway only: the whole step doubles the angle on a monkey saddle, and never settles.
            v = following / length + math.copysign(1, slope) * v
            v = v / torch.linalg.vector_norm(v)
    return ESTIMATE_SAFETY * largest
