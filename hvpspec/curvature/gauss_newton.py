"""The Gauss-Newton matrix of a network's loss as a symmetric operator."""

from __future__ import annotations

from hvpspec.curvature.matrices import GaussNewton
from hvpspec.curvature.operator import CurvatureOperator
from hvpspec.curvature.structure import is_convex_at
from hvpspec.linalg.operator import IndexBound


class GGNOperator(CurvatureOperator):
    """The generalised Gauss-Newton matrix at a network's present parameters.

    ``G = J^T (d^2 L / dz dz) J + 2 l2 I`` with the network's outputs ``z`` on the data and their
    derivative ``J`` by the parameters: the Hessian of ``L(theta) + l2 ||theta||^2`` for the
    linearised network. It leaves out the Hessian's other part, the sum of ``dL/dz_k`` times the
    Hessian of ``z_k``. So the two are equal where the outputs are affine in the parameters, as in
    those of a last linear layer, and close where the loss is nearly stationary in the outputs, as
    at an interpolating fit. Where the loss is convex in the outputs, G is positive semi-definite.

    Outputs are all floating-point tensors that the model returns, in tuples, lists and dicts, too
    (of outputs with an attribute ``logits``, that one): what of the loss is inside the model counts
    as part of the network. Products are exact, made in the same ways as those of the Hessian, at
    about the same cost, and ``to_dense`` takes as many of them.

    Args:
        model: the network, as for :class:`hvpspec.HessianOperator`, like all arguments.
        loss: a function of outputs and targets.
        data: the examples.
        params: which parameters.
        l2: the coefficient of ``||theta||^2``.
        chunk_size: the most examples in one graph.
        dtype: to compute in.
        engine: how products are made.
        memory_budget: bytes for what is kept between products.

    Attributes:
        space: names, shapes and order of the selected parameters in a vector.
        notes: what a reader of a result should know.

    Raises:
        InputError: an argument cannot be used; the message says why and what to do.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> X, y = torch.tensor([[1.0], [2.0]]), torch.zeros(2, 1)
        >>> net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Tanh())
        >>> _ = nn.init.constant_(net[0].weight, 1.0)
        >>> G = GGNOperator(net, nn.MSELoss(), (X, y))
        >>> G.to_dense()  # 2/N sum of (x (1 - tanh(x)^2))^2
        tensor([[0.1963]])

    Reference:
        Schraudolph, Fast curvature matrix-vector products for second-order gradient descent, Neural
        Computation 14 (2002); Martens, New insights and perspectives on the natural gradient
        method, JMLR 21 (2020), section 8.
    """

    _matrix = GaussNewton()

    def structural_upper_bound(self) -> IndexBound | None:
        """The bound 0 on the number of negative eigenvalues where the loss is convex.

        Returns:
            The bound, or None where the loss is not known to be convex in the outputs.
        """
        self.check_symmetry()
        if not self.objective.guard.is_verified:
            return None  # what the graph says is not what the products are
        loss = self.objective.loss
        with self._point.terms(self._point.leaves()) as terms:
            convex = all(is_convex_at(loss, term.outputs, term.targets) for term in terms)
        if not all(self.ranks.gather(convex)):
            return None
        return IndexBound(
            upper=0,
            psd_dim=self.shape[0],
            reason="The loss is convex in the outputs, so the Gauss-Newton matrix is positive"
            " semi-definite.",
        )
