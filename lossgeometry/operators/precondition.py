"""Curvature as an optimizer sees it: preconditioned, and where its steps become unstable."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from lossgeometry.errors import InputError
from lossgeometry.operators.base import CurvatureOperator, require_columns
from lossgeometry.parameters import flatten

ADAM = (Adam, AdamW)


class Preconditioned:
    r"""``P^-1/2 A P^-1/2``, where an optimizer steps along ``P^-1`` times the gradient.

    `P` is diagonal and as it is when this is made. With the second moments `v` (their maximum for
    ``amsgrad``) after `t` steps, all of it entry by entry:

    - SGD: the identity;
    - Adam, AdamW: ``(1 - β1^t) (sqrt(v / (1 - β2^t)) + ε)`` [1]_;
    - RMSprop: ``sqrt(v) + ε``, of the centred moments ``v - m²`` where it is ``centered``.

    Its square root divides twice by what may be next to nothing: the second moments of a bias in
    front of a batch normalisation, or of the keys of an attention, are rounding. The products with
    `A` are therefore made in double precision where the model allows it.

    What the optimizer does not move has zeros for rows and columns: parameters that it does not
    have, and those without a second moment as yet because they never had a gradient.

    Parameters
    ----------
    A
        A `Hessian` or another curvature of the model that is trained.
    optimizer
        One of `torch.optim.SGD`, `Adam`, `AdamW` and `RMSprop`, after its first step.

    Raises
    ------
    InputError
        The optimizer is another one, has made no step, or moves no parameter of `A`.

    See Also
    --------
    stability_threshold : the largest eigenvalue of this at which the steps are stable.

    References
    ----------
    .. [1] J. M. Cohen et al., Adaptive gradient methods at the edge of stability,
       arXiv 2207.14484, section 2.

    Examples
    --------
    >>> import torch
    >>> from lossgeometry import Hessian
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
    >>> loss_fn = torch.nn.functional.mse_loss
    >>> optimizer = torch.optim.RMSprop(model.parameters(), alpha=0.0, eps=0.0)
    >>> model.weight.data.fill_(1.0)
    tensor([[1., 1.]])
    >>> loss_fn(model(x), y).backward()  # the gradient is (1, 4)
    >>> optimizer.step()
    >>> Preconditioned(Hessian(model, loss_fn, (x, y)), optimizer) @ torch.eye(2)
    tensor([[1., 0.],
            [0., 1.]])
    """

    def __init__(self, A: CurvatureOperator, optimizer: Optimizer) -> None:
        self._A = A.in_float64()
        self.shape, self.dtype, self.device, self.team = A.shape, A.dtype, A.device, A.team
        self.scale = _scale(A, _inner(optimizer))  # (P,), the diagonal of P^-1/2

    def __matmul__(self, vectors: Tensor) -> Tensor:
        """Product with a vector (P,) or with the columns of a matrix (P, k)."""
        require_columns(self, vectors)
        scale = (self.scale if vectors.ndim == 1 else self.scale[:, None]).to(self._A.dtype)
        return (scale * (self._A @ (scale * vectors.to(scale)))).to(vectors)


def stability_threshold(optimizer: Optimizer) -> float:
    """Largest curvature at which the steps of an optimizer do not diverge on a quadratic loss.

    Of the preconditioned curvature (see `Preconditioned`; of SGD the curvature itself), with step
    `s` and momentum `b`:

    - gradient descent: ``2 / s``, with heavy-ball momentum ``(2 + 2b) / s``, with Nesterov's
      ``(2 / s) (1 + b) / (1 + 2b)`` [1]_; dampening `d` of the heavy ball divides it by ``1 - d``;
    - Adam, AdamW: ``(2 + 2 β1) / ((1 - β1) s)`` [2]_; RMSprop as gradient descent.

    Weight decay that is part of the gradient belongs to the curvature (``weight_decay=`` of
    `Hessian`). AdamW's `w`, which is not, lowers the threshold by the factor ``1 - s w / 2``, left
    out here.

    Parameters
    ----------
    optimizer
        One of `torch.optim.SGD`, `Adam`, `AdamW` and `RMSprop`.

    Returns
    -------
    float
        In the units of the eigenvalues; infinity for steps of zero; NaN where parameter groups
        have different ones, since then no one number tells.

    Raises
    ------
    InputError
        The optimizer is another one, or maximises.

    See Also
    --------
    Preconditioned : the operator of which it is the largest stable eigenvalue.
    CurvatureTracker : both, while a network trains.

    References
    ----------
    .. [1] J. M. Cohen et al., Gradient descent on neural networks typically occurs at the edge of
       stability, ICLR 2021, appendix B.
    .. [2] J. M. Cohen et al., Adaptive gradient methods at the edge of stability, arXiv 2207.14484.

    Examples
    --------
    >>> import torch
    >>> weights = [torch.nn.Parameter(torch.zeros(3))]
    >>> round(stability_threshold(torch.optim.SGD(weights, lr=0.1, momentum=0.9)), 6)
    38.0
    >>> round(stability_threshold(torch.optim.Adam(weights, lr=0.001)), 6)
    38000.0
    """
    optimizer = _inner(optimizer)
    found = {_threshold(optimizer, group) for group in optimizer.param_groups}
    return found.pop() if len(found) == 1 else math.nan


def _inner(optimizer: Any) -> Optimizer:
    """The optimizer inside of those of Lightning and Accelerate."""
    optimizer = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(optimizer, (SGD, *ADAM, RMSprop)):
        raise InputError(
            f"optimizer: a {type(optimizer).__name__}, expected SGD, Adam, AdamW or RMSprop of "
            "torch.optim"
        )
    if any(group["maximize"] for group in optimizer.param_groups):
        raise InputError("optimizer: it maximises, expected one that minimises")
    return optimizer


def _threshold(optimizer: Optimizer, group: dict[str, Any]) -> float:
    step = float(group["lr"])
    if isinstance(optimizer, ADAM):
        momentum = float(group["betas"][0])
        step *= 1 - momentum
    else:
        momentum = float(group["momentum"])
        step *= 1 - (float(group.get("dampening", 0.0)) if momentum else 0.0)
    if step == 0:
        return math.inf
    nesterov = 1 + 2 * momentum if group.get("nesterov") else 1.0
    return (2 + 2 * momentum) / (step * nesterov)


def _scale(A: CurvatureOperator, optimizer: Optimizer) -> Tensor:
    """Diagonal of ``P^-1/2``."""
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    parameters = dict(A._objective.model.named_parameters())
    pieces, moved = [], False
    for name in A._parameters:
        parameter = parameters[name]
        group, state = groups.get(parameter), optimizer.state.get(parameter, {})
        known = group is not None and (isinstance(optimizer, SGD) or "step" in state)
        moved |= known
        diagonal = _diagonal(optimizer, group, state, parameter) if known and group else None
        pieces.append(torch.zeros_like(parameter) if diagonal is None else diagonal.rsqrt())
    if not moved:
        raise InputError(
            "optimizer: it has not moved the parameters of the operator, expected the optimizer of "
            "the model after its first step"
        )
    return flatten(pieces).detach().to(A.device, A.dtype)


def _diagonal(
    optimizer: Optimizer, group: dict[str, Any], state: dict[str, Any], parameter: Tensor
) -> Tensor:
    """Of `P`, with the shape of a parameter."""
    if isinstance(optimizer, ADAM):
        beta1, beta2 = group["betas"]
        v = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
        t = float(state["step"])
        return (1 - beta1**t) * ((v / (1 - beta2**t)).sqrt() + group["eps"])
    if isinstance(optimizer, RMSprop):
        v = state["square_avg"]
        if group["centered"]:
            v = v - state["grad_avg"].square()
        return v.sqrt() + group["eps"]
    return torch.ones_like(parameter)
