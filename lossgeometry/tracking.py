"""Curvature while a network trains: rows of numbers that are kept, drawn and logged."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lossgeometry.algorithms.eigensolver import Eigenpairs, SymmetricOperator, eigsh
from lossgeometry.algorithms.trace import trace
from lossgeometry.algorithms.warm import follow
from lossgeometry.batches import Data, as_batches
from lossgeometry.errors import InputError
from lossgeometry.landscape.directions import Direction
from lossgeometry.landscape.flatness import flatness
from lossgeometry.landscape.slices import line
from lossgeometry.objective import LossFunction
from lossgeometry.operators.hessian import Hessian
from lossgeometry.operators.precondition import Preconditioned, stability_threshold
from lossgeometry.parameters import select_parameters
from lossgeometry.seeds import derive_seed, untouched_rng
from lossgeometry.storing import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TOLERANCE = 0.02  # relative error of the eigenvalues at which no more products are made
PRODUCTS = 6  # at most, an eigenvalue, once there are eigenvectors to start from
XS = np.linspace(-1.0, 1.0, 21)  # steps along the direction of the flatness

Row: TypeAlias = "dict[str, float | np.ndarray]"


@dataclass(frozen=True, repr=False)
class CurvatureHistory(Result):
    """What a `CurvatureTracker` has measured: n rows; NaN is what was not asked for.

    See Also
    --------
    CurvatureTracker : measures it.
    plots.plot_curvature : several of them in one picture.

    Examples
    --------
    >>> import torch
    >>> from torch.nn.functional import mse_loss
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> data = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
    >>> from lossgeometry import CurvatureTracker
    >>> tracker = CurvatureTracker(model, mse_loss, data, every=1)
    >>> tracker.step()
    >>> tracker.result().eigenvalues.round(3)
    array([[4.]])
    """

    steps: np.ndarray  # (n,) int, steps that the optimizer had made
    eigenvalues: np.ndarray  # (n, k), the largest, descending
    errors: np.ndarray  # (n, k), stated: an eigenvalue of the operator is within it
    loss: np.ndarray  # (n,), the objective on the probe
    gradient_norm: np.ndarray  # (n,), of the objective
    gradient_curvature: np.ndarray  # (n,), second derivative along the normalised gradient
    threshold: np.ndarray  # (n,), eigenvalue above which the next step is unstable
    trace: np.ndarray  # (n,), of the operator, estimated
    trace_error: np.ndarray  # (n,), one standard error
    width: np.ndarray  # (n,), in steps along the direction; this and the next two: `flatness`
    sharpness: np.ndarray  # (n,), in percent
    asymmetry: np.ndarray  # (n,), in [0, 1] where the loss rises on both sides
    matvecs: np.ndarray  # (n,) int, products that the eigenvalues took

    def plot(self, ax: Axes | None = None) -> Axes:
        """Eigenvalues over the steps, and the threshold if there is one."""
        from lossgeometry.plots import plot_curvature

        return plot_curvature(
            self.steps, self.eigenvalues, self.errors, threshold=self.threshold, ax=ax
        )

    @classmethod
    def of(cls, rows: list[Row], k: int) -> CurvatureHistory:
        """The history of such rows, with eigenvalues (k,) in each."""

        def column(name: str) -> np.ndarray:
            shape = (len(rows), k) if name in ("eigenvalues", "errors") else (len(rows),)
            numbers = [row.get(name, math.nan) for row in rows]
            kind = int if name in ("steps", "matvecs") else float
            return np.array(numbers, dtype=kind).reshape(shape)

        return cls(**{field.name: column(field.name) for field in fields(cls)})

    def rows(self) -> list[Row]:
        """Inverse of `of`."""
        return [{name: c[i] for name, c in vars(self).items()} for i in range(len(self.steps))]


class CurvatureTracker:
    """The largest eigenvalues of the Hessian, and more, every so many steps of a training.

    A training with it is the training without it, to the last bit: weights, buffers, gradients,
    modes and random streams stay as they are. What is measured is the loss on the probe at the
    present weights, in the mode (training or evaluation) in which the model is at that time.
    `lossgeometry.callbacks.lightning.CurvatureCallback` and, for HuggingFace's Trainer,
    `lossgeometry.callbacks.huggingface.CurvatureCallback` call it in the training loops of others.

    Parameters
    ----------
    model, loss_fn
        As of `Hessian`.
    probe
        The data to measure on, a batch or an iterable of them, read once, here. A product with the
        Hessian costs about as much as two or three training steps on the same data.
    every
        Measure after each so many steps.
    k
        How many eigenvalues.
    precondition
        The optimizer of the training: measure the curvature that it sees, `Preconditioned`, with
        its `stability_threshold`. SGD leaves the Hessian as it is. The curvature along the gradient
        is then that along the optimizer's step, in the same units as the eigenvalues.
    trace
        Products with random vectors for the trace; 0 leaves it out.
    direction
        Also cut the loss along this direction (of `random_directions`, say) through the present
        weights, from -1 to 1, for its `flatness`.
    path
        HDF5 file that holds the rows, written after each of them.
    start
        Steps that were made before. A training that goes on at a checkpoint says so, and keeps the
        rows of `path` up to there; those after it are replaced. None: it is a new training, and
        there must not be a file.
    log
        Called with each row, a dict of floats: ``wandb.log``, or ``lambda row:
        [writer.add_scalar(name, x, row["step"]) for name, x in row.items()]`` for TensorBoard.
    seed
        Of all random vectors, and of what is random in the model.
    **options
        As of `Hessian`: `weight_decay`, `params`, `forward`, `count`, `micro_batch`, ...

    Raises
    ------
    InputError
        An option is out of range, `precondition` is an optimizer that `Preconditioned` does not
        know, `path` holds rows and `start` is None, or they are of another `k`.

    See Also
    --------
    CurvatureHistory : what it has measured.
    Preconditioned : the curvature that an optimizer sees.
    stability_threshold : where its steps become unstable.

    Notes
    -----
    The first row is a solve of `eigsh`. Those after it start from the eigenvectors of the row
    before, and one that stands guard for what may overtake them, and end when the errors are below
    2 %, or after 6k products. An eigenvalue of the Hessian is within the error of each, and the
    error reaches to whatever larger one the vectors show; that there is none of which they show
    nothing is not made sure of again, as `eigsh` would, which takes three times the products.

    An operator that is refused because it is not symmetric is a warning and NaN: no training ends
    for it.

    Examples
    --------
    >>> import torch
    >>> from torch.nn.functional import mse_loss
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> tracker = CurvatureTracker(model, mse_loss, (x, y), every=5, precondition=optimizer)
    >>> for _ in range(10):
    ...     optimizer.zero_grad()
    ...     mse_loss(model(x), y).backward()
    ...     optimizer.step()
    ...     tracker.step()
    >>> history = tracker.result()
    >>> history.steps, history.eigenvalues.round(3), history.threshold
    (array([ 5, 10]), array([[4.],
           [4.]]), array([20., 20.]))
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction | None,
        probe: Data,
        *,
        every: int = 50,
        k: int = 1,
        precondition: Optimizer | None = None,
        trace: int = 0,
        direction: Direction | None = None,
        path: str | Path | None = None,
        start: int | None = None,
        log: Callable[[dict[str, float]], object] | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        if every < 1:
            raise InputError(f"every: {every}, expected at least 1 step")
        parameters = select_parameters(model, options.get("params"))
        P = sum(parameter.numel() for parameter in parameters.values())
        if not 1 <= k <= P:
            raise InputError(f"k: {k}, expected 1 to {P}")
        if direction is not None and loss_fn is None:
            raise InputError("direction: expected a loss_fn beside it, found None")
        if precondition is not None:
            stability_threshold(precondition)  # raises if it is one that is not known
        self._device = next(iter(parameters.values())).device
        with untouched_rng(self._device):
            self._probe = as_batches(probe, count=options.get("count"))
        self._model, self._loss_fn, self._options = model, loss_fn, options
        self._every, self._k, self._seed = every, k, seed
        self._optimizer, self._trace, self._direction = precondition, trace, direction
        self._path, self._log = path, log
        self._rows = _earlier(path, start, k)
        self._step = start or 0
        self._vectors: Tensor | None = None  # (P, k or k + 1) of the last row

    def step(self, step: int | None = None) -> None:
        """To be called after each step of the optimizer; measures when it is time.

        `step` is how many there have been; None: one more than at the last call.
        """
        before, self._step = self._step, self._step + 1 if step is None else step
        if self._step // self._every == before // self._every:
            return
        with untouched_rng(self._device):
            row = self._measured()
        self._rows.append(row)
        if self._path is not None:
            self.result().save(self._path)
        if self._log is not None:
            self._log(_scalars(row))

    def result(self) -> CurvatureHistory:
        """All rows so far."""
        return CurvatureHistory.of(self._rows, self._k)

    def plot(self, ax: Axes | None = None) -> Axes:
        """All rows so far, see `CurvatureHistory.plot`."""
        return self.result().plot(ax)

    def _measured(self) -> Row:
        seed = derive_seed(self._seed, self._step)
        options: dict[str, Any] = {"seed": self._seed, **self._options}
        H = Hessian(self._model, self._loss_fn, self._probe, **options)
        A = H if self._optimizer is None else Preconditioned(H, self._optimizer)
        try:
            found = self._solved(A, seed)
            total = trace(A, matvecs=self._trace, seed=seed) if self._trace else None
        except InputError as error:  # which is no reason to end a training
            warnings.warn(f"step {self._step}: no eigenvalues: {error}", stacklevel=3)
            found, total = _none(A, self._k), None
        self._vectors = found.eigenvectors
        value, gradient = H.value_and_gradient()
        row: Row = {
            "steps": self._step,
            "eigenvalues": found.eigenvalues[: self._k].numpy(),
            "errors": found.errors[: self._k].numpy(),
            "matvecs": found.matvecs,
            "loss": value,
            "gradient_norm": float(gradient.norm()),
            "gradient_curvature": _along(A, gradient),
        }
        if self._optimizer is not None:
            row["threshold"] = stability_threshold(self._optimizer)
        if total is not None:
            row |= {"trace": total.estimate, "trace_error": total.standard_error}
        if self._direction is not None:
            how = {key: options[key] for key in ("forward", "count") if key in options}
            losses = {"loss": self._loss_fn}
            cut = line(self._model, losses, self._probe, self._direction, XS, **how)["loss"]
            flat = flatness(XS, cut[None])
            row |= {key: getattr(flat, key)[0] for key in ("width", "sharpness", "asymmetry")}
        return row

    def _solved(self, A: SymmetricOperator, seed: int) -> Eigenpairs:
        k, old = self._k, self._vectors
        if old is None or not old.isfinite().all():
            return eigsh(A, k, which="LA", tol=TOLERANCE, seed=seed)
        if old.shape[1] == k < A.shape[0]:  # the guard begins as anybody
            guard = torch.randn(len(old), 1, generator=torch.Generator().manual_seed(seed))
            guard = guard.to(old)
            old = torch.cat([old, guard / guard.norm()], dim=1)
        return follow(A, old, tol=TOLERANCE, maxiter=PRODUCTS * k, seed=seed)


def _none(A: SymmetricOperator, k: int) -> Eigenpairs:
    nan = torch.full((k,), math.nan, dtype=torch.float64)
    none = torch.zeros(k, dtype=torch.bool)
    return Eigenpairs(nan, torch.full((A.shape[0], k), math.nan), nan, nan, none, 0)


def _along(A: Hessian | Preconditioned, gradient: Tensor) -> float:
    """Curvature along the gradient, in the coordinates of `A`; NaN where there is none."""
    ahead = gradient * A.scale if isinstance(A, Preconditioned) else gradient
    unit = ahead / ahead.norm()
    return float((unit.double() * (A @ unit).double()).sum())


def _earlier(path: str | Path | None, start: int | None, k: int) -> list[Row]:
    """The rows that a training goes on with."""
    if path is None or not Path(path).exists():
        return []
    if start is None:
        raise InputError(f"path: {path} exists; start=N keeps its rows up to step N, 0 keeps none")
    earlier = CurvatureHistory.load(path)
    if earlier.eigenvalues.shape[1] != k:
        raise InputError(
            f"k: {k}, expected {earlier.eigenvalues.shape[1]}, as many as {path} holds in each row"
        )
    return [row for row in earlier.rows() if row["steps"] <= start]


def _scalars(row: Row) -> dict[str, float]:
    """A row for a logger: no array, and numbers from 1 on."""
    scalars: dict[str, float] = {"step": int(row["steps"])}
    for name, value in row.items():
        if name in ("eigenvalues", "errors"):
            singular = name[:-1]
            scalars |= {f"{singular}_{i}": float(x) for i, x in enumerate(np.ravel(value), 1)}
        elif name != "steps":
            scalars[name] = float(value)
    return scalars
