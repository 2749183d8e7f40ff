"""Several mini-batches at once: their Hessians as one operator, and their eigenvalues in lock-step.

A mini-batch of 16 images does not keep a GPU busy. Here each product is made of many of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lossgeometry.algorithms.eigensolver import Eigenpairs, lanczos, plan
from lossgeometry.errors import InputError
from lossgeometry.objective import FrozenLoss, LossFunction
from lossgeometry.operators.captured import Captured, Recorder, on_stream_of
from lossgeometry.operators.graphs import gradient
from lossgeometry.operators.hessian import Hessian
from lossgeometry.parameters import unflatten_rows
from lossgeometry.running.devices import full_precision
from lossgeometry.seeds import seeded
from lossgeometry.symmetry import allowed_asymmetry, asymmetry


class HessianStack:
    """The Hessians of `n` mini-batches of one shape, each with parameters of its own.

    One forward pass under `torch.vmap` has the gradients of all, and a product is a backward pass
    through it: reverse mode twice, as in `Hessian`. What is random is drawn once, for each
    mini-batch differently, from the `seed` of the first.

    Parameters
    ----------
    model, loss_fn, weight_decay, params, seed
        As of `Hessian`.
    batches
        ``(x, y)``, all of one shape.
    recorder
        Where products are to be recorded, see `Hessian`; None: they are not.
    """

    @full_precision()
    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction | None,
        batches: Sequence[tuple[Tensor, Tensor]],
        *,
        weight_decay: float = 0.0,
        params: str | None = None,
        seed: int = 0,
        recorder: Recorder | None = None,
    ) -> None:
        xs, ys = (torch.stack(tensors) for tensors in zip(*batches, strict=True))
        one = FrozenLoss(model, loss_fn, batches[0], params=params, seed=seed)
        self._weight_decay = weight_decay
        leaves = {
            name: p.detach().expand(len(xs), *p.shape).clone().requires_grad_()
            for name, p in one.parameters.items()
        }
        variables = list(leaves.values())
        with (
            on_stream_of(recorder),
            torch.enable_grad(),
            seeded(one.device, one.chunks[0].seed),
        ):
            losses = torch.vmap(one.value, randomness="different")(
                leaves, xs.to(one.device), ys.to(one.device)
            )
            gradients = torch.autograd.grad(
                losses.sum(),
                variables,
                create_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )

        def multiply(rows: Tensor) -> Tensor:
            found = gradient(gradients, variables, unflatten_rows(rows, one.parameters))
            return torch.cat([piece.flatten(1) for piece in found], dim=1)

        self._multiply = Captured(multiply, recorder)
        self._length = len(xs)
        size = sum(p.numel() for p in one.parameters.values())
        self.shape, self.dtype, self.device = (size, size), one.dtype, one.device

    @full_precision()
    def products(self, vectors: Tensor) -> Tensor:
        """The product of each Hessian with its row of `vectors` (n, P)."""
        return torch.add(self._multiply(vectors), vectors, alpha=self._weight_decay)

    def require_symmetric(self) -> None:
        """Raise `InputError` if products are numbers, but not those of symmetric matrices."""
        shape = (2, self._length, self.shape[0])
        generator = torch.Generator().manual_seed(0)
        u, v = torch.randn(shape, generator=generator, dtype=torch.float64).to(
            self.device, self.dtype
        )
        found = asymmetry(u, self.products(u), v, self.products(v))
        allowed = allowed_asymmetry(self.dtype)
        if found > allowed:
            raise InputError(
                f"together: Hessian-vector products of several mini-batches at once are asymmetric "
                f"by {found:.1e}, expected at most {allowed:.1e}; solve one at a time"
            )


def stackable(model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> bool:
    """Whether mini-batches can be one `HessianStack`.

    Batch normalisation in training mode writes to buffers, of which there is one for all.
    """
    shapes = {(x.shape, x.dtype, y.shape, y.dtype) for x, y in batches}
    writes = any(isinstance(m, _BatchNorm) and m.training for m in model.modules())
    return len(shapes) == 1 and not writes


def vmappable(
    model: nn.Module,
    loss_fn: LossFunction | None,
    batch: tuple[Tensor, Tensor],
    *,
    params: str | None = None,
) -> bool:
    """Whether `torch.vmap` can do all that `model` and `loss_fn` do.

    It cannot draw random numbers into a tensor that is the same for all mini-batches, as
    torchvision's stochastic depth does, nor hand out numbers to Python. Raises `InputError` if what
    it does is wrong: products are asymmetric, or not those of the `Hessian`, which can be told
    where nothing is random.
    """
    try:
        stack = HessianStack(model, loss_fn, [batch, batch], params=params)
    except RuntimeError as error:
        if "vmap" not in str(error):
            raise
        return False
    stack.require_symmetric()
    H = Hessian(model, loss_fn, batch, params=params)
    if not H.draws():
        _require_equal(stack, H)
    return True


def _require_equal(stack: HessianStack, H: Hessian) -> None:
    """Raise `InputError` if a stack of twice the mini-batch of `H` has other products."""
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(H.shape[0], generator=generator, dtype=torch.float64).to(H.device, H.dtype)
    tolerance = torch.finfo(H.dtype).eps ** 0.5
    exact = H @ v
    error = float((stack.products(v.expand(2, -1)) - exact).norm() / (exact.norm() * 2**0.5))
    if error > tolerance:
        raise InputError(
            f"together: Hessian-vector products of several mini-batches at once are {error:.1e} "
            f"off those of one, expected at most {tolerance:.1e}; solve one at a time"
        )


def faster_together(
    model: nn.Module,
    loss_fn: LossFunction | None,
    batch: tuple[Tensor, Tensor],
    H: Hessian,
    n: int,
    *,
    params: str | None = None,
    recorder: Recorder | None = None,
) -> bool:
    """Whether products of `n` mini-batches take less time at once than one after another.

    As they do not where vmap has to make do with slow kernels: of convolutions whose weights
    differ it makes grouped ones. `H` is the `Hessian` of `batch`, which is taken for all of them.
    """
    stack = HessianStack(model, loss_fn, [batch] * n, params=params, recorder=recorder)
    v = torch.ones(H.shape[0], dtype=H.dtype, device=H.device)
    vectors = v.expand(n, -1)
    return _seconds(lambda: stack.products(vectors)) < n * _seconds(lambda: H @ v)


def _seconds(product: Callable[[], Tensor]) -> float:
    """Of one of several products, once they are recorded."""
    for _ in range(2):
        float(product().sum())
    start = time.perf_counter()
    for _ in range(3):
        last = product()
    float(last.sum())  # it is waited for
    return (time.perf_counter() - start) / 3


def eigsh_lockstep(
    H: HessianStack, k: int, starts: Sequence[Tensor | None], seeds: Sequence[int], **options: Any
) -> list[Eigenpairs]:
    """`eigsh` of every Hessian of a stack, one product of all at a time.

    `starts` and `seeds` are the ``v0`` and ``seed`` of each; `options` are those of `eigsh`.
    """
    search = plan(H, k, **options)
    solves = [lanczos(H, search, v0=v0, seed=seed) for v0, seed in zip(starts, seeds, strict=True)]
    vectors = torch.stack([next(solve) for solve in solves])
    found: dict[int, Eigenpairs] = {}
    while len(found) < len(solves):
        products = H.products(vectors)
        for i, solve in enumerate(solves):
            if i in found:
                continue
            try:
                vectors[i] = solve.send(products[i])
            except StopIteration as end:
                found[i] = end.value
    return [found[i] for i in range(len(solves))]
