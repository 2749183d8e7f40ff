"""The Hessian max eigenvalue spectrum: the leading eigenvalues of many mini-batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from lossgeometry.algorithms.eigensolver import Eigenpairs, default_ncv, eigsh
from lossgeometry.algorithms.lockstep import (
    HessianStack,
    eigsh_lockstep,
    faster_together,
    stackable,
    vmappable,
)
from lossgeometry.algorithms.power_iteration import power_iteration
from lossgeometry.batches import Batch, Count, Data, Forward, as_batches, is_pair
from lossgeometry.errors import InputError
from lossgeometry.objective import LossFunction
from lossgeometry.operators.captured import make_recorder, occupying_bytes
from lossgeometry.operators.hessian import Hessian
from lossgeometry.parameters import select_parameters
from lossgeometry.running.devices import default_memory, full_precision
from lossgeometry.running.distributed import ALONE, Team
from lossgeometry.running.saving import Saver, filled
from lossgeometry.running.threads import MOST_THREADS, free_threads, parallel
from lossgeometry.seeds import derive_seed
from lossgeometry.storing import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Solver = Literal["lanczos", "pyhessian"]
Columns = dict[str, np.ndarray]  # of the `Eigenpairs` of several mini-batches, a row for each


@dataclass(frozen=True, repr=False)
class MaxEigenvalueSpectrum(Result):
    """Eigenvalues of largest magnitude of every mini-batch, and what they say together.

    Standard errors are over mini-batches, the eigenvalues of one being dependent. A mini-batch
    whose Hessian is not finite has NaN eigenvalues, and NEP and APE are NaN then.

    See Also
    --------
    max_eigenvalue_spectrum : computes it.
    plots.plot_max_eigenvalues : several of them in one picture.

    Examples
    --------
    >>> import torch
    >>> from torch.nn.functional import mse_loss
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> data = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
    >>> from lossgeometry import max_eigenvalue_spectrum
    >>> spectrum = max_eigenvalue_spectrum(model, mse_loss, [data, data, data], k=2)
    >>> spectrum.eigenvalues.shape, round(spectrum.ape, 3)  # eigenvalues 4 and 1, three times
    (torch.Size([3, 2]), 2.5)
    """

    eigenvalues: Tensor  # (n_batches, k) float64, largest magnitude first
    residuals: Tensor  # (n_batches, k) float64, ‖H x - λ x‖
    errors: Tensor  # (n_batches, k) float64, an eigenvalue of H is at most so far away
    converged: Tensor  # (n_batches, k) bool
    matvecs: Tensor  # (n_batches,) int64, Hessian-vector products
    batches_at_a_time: int  # mini-batches that were solved in lock-step
    nep: float  # negative max eigenvalue proportion, the share, 0 to 1, of those below zero
    nep_standard_error: float
    ape: float  # average of the positive max eigenvalues; NaN if there are none
    ape_standard_error: float

    def plot(
        self, ax: Axes | None = None, *, half: Literal["negative", "positive"] = "positive"
    ) -> Axes:
        """Density of the eigenvalues on one side of zero, on a logarithmic axis."""
        from lossgeometry.plots import plot_max_eigenvalues

        return plot_max_eigenvalues(self.eigenvalues.numpy(), half, ax=ax)


def max_eigenvalue_spectrum(
    model: nn.Module,
    loss_fn: LossFunction | None,
    batches: Data,
    k: int = 5,
    *,
    weight_decay: float = 0.0,
    params: str | None = None,
    forward: Forward | None = None,
    count: Count | None = None,
    tol: float = 1e-3,
    seed: int = 0,
    solver: Solver = "lanczos",
    compile: bool = False,
    memory: int | None = None,
    together: int | None = None,
    team: Team = ALONE,
    resume: Mapping[str, np.ndarray] | None = None,
    save: Callable[[dict[str, np.ndarray]], object] | None = None,
) -> MaxEigenvalueSpectrum:
    """Top-`k` Hessian eigenvalues by magnitude of each mini-batch (Park and Kim 2022, Section 2).

    The objective is ``loss_fn`` plus ``weight_decay/2 * |theta|^2`` on the batches as they are: to
    measure the landscape a network is trained on, give augmented batches, its weight decay and the
    model in training mode. Each solve starts from the eigenvectors of the first mini-batch.

    Parameters
    ----------
    model, loss_fn, weight_decay, params, forward, count
        As of `Hessian`.
    batches
        One batch or an iterable of them, typically of 16 images, of any kind that `Hessian` takes.
    k
        Eigenvalues for each mini-batch.
    tol
        Relative error of the eigenvalues; for "pyhessian" the relative change at which it stops.
    seed
        Of the start vectors and of what is random in the forward pass.
    solver
        "lanczos", or "pyhessian": power iteration with deflation by the PyHessian package, the
        protocol of the paper, which works in evaluation mode whatever the mode of the model, and
        on batches of a tensor of inputs and one of targets.
    compile
        As of `Hessian`, once for all mini-batches of the size of the first.
    memory
        As of `Hessian`, for all mini-batches that are being solved.
    together
        Mini-batches that are solved in lock-step, with one product for all of them, as far as
        `memory` holds what they take. None chooses by device: on a GPU as many as occupy it, if
        that is seen to be faster than one after another, on a CPU one. There each thread that
        PyTorch has solves mini-batches of its own, as far as `memory` holds what that takes, unless
        `compile` or a `team` has a use for the threads.
    team
        Processes among which the mini-batches are dealt out; all get the whole result.
    resume
        What `save` received from the same call before it was interrupted: it goes on from there.
    save
        Called, by the first process of the team, with arrays to store, after about every ten
        seconds and when interrupted.

    Returns
    -------
    MaxEigenvalueSpectrum
        The eigenvalues, and NEP and APE with standard errors over the mini-batches.

    Raises
    ------
    InputError
        No batches, or some that `solver` does not take; `k`, `solver` or `together` out of range;
        `resume` of another call.

    See Also
    --------
    eigsh : of all data at once.
    per_layer : an operator for each part of a model.

    References
    ----------
    N. Park and S. Kim, *How Do Vision Transformers Work?*, ICLR 2022.

    Examples
    --------
    >>> import torch
    >>> from torch.nn.functional import mse_loss
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> model.load_state_dict({"weight": torch.tensor([[1.0, 2.0]])})
    <All keys matched successfully>
    >>> data = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
    >>> from lossgeometry import max_eigenvalue_spectrum
    >>> spectrum = max_eigenvalue_spectrum(model, mse_loss, [data, data], k=1, tol=1e-6)
    >>> spectrum.eigenvalues.round(decimals=3), spectrum.nep
    (tensor([[4.],
            [4.]], dtype=torch.float64), 0.0)
    """
    if solver not in get_args(Solver):
        raise InputError(f"solver: {solver!r}, expected one of {', '.join(get_args(Solver))}")
    drawn = as_batches(batches, count=count)
    plain = forward is None and _are_stacks(drawn)
    seeds = [derive_seed(seed, i) for i in range(len(drawn))]
    common: dict[str, Any] = {"weight_decay": weight_decay, "params": params}
    how: dict[str, Any] = {"forward": forward, "count": count, **common}
    if solver == "pyhessian":
        if loss_fn is None or not plain:
            raise InputError(
                "solver: pyhessian found, expected lanczos: pyhessian takes batches of a tensor of "
                "inputs and one of targets, and a loss of them"
            )
        iterate = partial(power_iteration, model, loss_fn, k=k, tol=tol, **common)
    parameters = select_parameters(model, params).values()
    if k < 1:
        raise InputError(f"k: {k}, expected 1 to {sum(p.numel() for p in parameters)}")
    if together is not None and together < 1:
        raise InputError(f"together: {together}, expected at least 1")
    if memory is None:
        memory = default_memory(next(iter(parameters)).device)

    rows = filled(_blank(len(drawn), k), resume)
    saver = Saver(save if team.rank == 0 else None, rows)
    bar = tqdm(total=len(drawn), desc="max eigenvalues", unit="batch", leave=False, disable=None)

    def fill(indices: Sequence[int], found: Columns) -> None:
        for key, values in found.items():
            rows[key][indices] = values
        rows["done"][indices] = True
        bar.update(int(rows["done"].sum()) - bar.n)
        saver.now_and_then()

    with bar, saver:
        workers = group_size = 1
        if solver == "pyhessian":

            def solve(group: Sequence[int]) -> list[Eigenpairs]:
                return [iterate(batch=drawn[i], seed=seeds[i]) for i in group]
        else:
            H = Hessian(
                model, loss_fn, [drawn[0]], compile=compile, memory=memory, seed=seeds[0], **how
            )
            first = eigsh(H, k, tol=tol, seed=seeds[0])
            fill([0], _table([first]))
            known = first.eigenvectors if first.eigenvectors.isfinite().all() else None
            recorder = make_recorder(H.device)

            def choose_group_size() -> int:
                wanted = _occupying(H, len(drawn) - 1) if together is None else together
                size = min(wanted, _fitting(H, k, memory))
                if size == 1 or not (plain and vmappable(model, loss_fn, drawn[0], params=params)):
                    return 1
                if together is None and not faster_together(
                    model, loss_fn, drawn[0], H, size, recorder=recorder, params=params
                ):
                    return 1
                return size

            group_size = team.first(choose_group_size)  # all have to deal out the same groups
            if group_size == 1 and not compile and team.size == 1:
                workers = _choose_threads(H, k, len(drawn) - 1, memory)

            def solve(group: Sequence[int]) -> list[Eigenpairs]:
                members = [drawn[i] for i in group]
                own = [seeds[i] for i in group]
                starts = [known] * len(group)
                if len(group) > 1 and stackable(model, members):
                    stack = HessianStack(
                        model, loss_fn, members, seed=own[0], recorder=recorder, **common
                    )
                    return eigsh_lockstep(stack, k, starts, own, tol=tol)
                return [
                    eigsh(H.on([batch], seed=seed), k, tol=tol, v0=v0, seed=seed)
                    for batch, v0, seed in zip(members, starts, own, strict=True)
                ]

        missing = np.flatnonzero(~rows["done"]).tolist()
        groups = [missing[i : i + group_size] for i in range(0, len(missing), group_size)]

        def work(i: int) -> Columns:
            return _table(solve(groups[i]))

        if workers == 1:
            for i, columns in team.share(len(groups), work):
                fill(groups[i], columns)
        else:
            # The precision is set here, for threads that each set and reset it would leave it as
            # one of them saw it.
            with full_precision(), closing(parallel(work, range(len(groups)), workers)) as found:
                for i, columns in found:
                    fill(groups[i], columns)
    return _summary({key: torch.from_numpy(rows[key]) for key in _COLUMNS}, group_size)


_COLUMNS = ("eigenvalues", "residuals", "errors", "converged", "matvecs")  # of `Eigenpairs`


def _blank(n: int, k: int) -> Columns:
    """A row for each mini-batch, to be filled."""
    numbers = {key: np.full((n, k), np.nan) for key in _COLUMNS[:3]}
    return numbers | {
        "converged": np.zeros((n, k), dtype=bool),
        "matvecs": np.zeros(n, dtype=np.int64),
        "done": np.zeros(n, dtype=bool),
    }


def _table(pairs: Sequence[Eigenpairs]) -> Columns:
    """Rows of several mini-batches, small enough to travel."""
    return {key: np.stack([np.asarray(getattr(pair, key)) for pair in pairs]) for key in _COLUMNS}


def _summary(columns: dict[str, Tensor], together: int) -> MaxEigenvalueSpectrum:
    eigenvalues = columns["eigenvalues"]
    n, k = eigenvalues.shape
    missing = torch.where(eigenvalues.isnan(), eigenvalues, 0.0)
    negative = (eigenvalues < 0) + missing
    positive = (eigenvalues > 0) + missing
    nep, nep_standard_error = _ratio_of_sums(negative.sum(1), torch.full((n,), k))
    ape, ape_standard_error = _ratio_of_sums((eigenvalues * positive).sum(1), positive.sum(1))
    return MaxEigenvalueSpectrum(
        **columns,
        batches_at_a_time=together,
        nep=nep,
        nep_standard_error=nep_standard_error,
        ape=ape,
        ape_standard_error=ape_standard_error,
    )


def _occupying(H: Hessian, solves: int) -> int:
    """How many solves like that of `H`, done already, occupy its device, of so many at most."""
    kept = H.kept_bytes()
    if H.device.type == "cpu" or kept is None:
        return 1  # intermediate results of more would leave the cache of a CPU
    return max(min(occupying_bytes(H.device) // max(kept, 1), solves), 1)


def _are_stacks(batches: Sequence[Batch]) -> bool:
    """Whether batches are pairs of a tensor each."""
    return all(is_pair(b) and all(isinstance(part, Tensor) for part in b) for b in batches)


def _fitting(H: Hessian, k: int, memory: int) -> int:
    """How many solves like that of `H`, done already, may be in lock-step, at least one.

    Each has parameters of its own.
    """
    taken = _solve_bytes(H, k)
    return 1 if taken is None else max(memory // (taken + H.shape[0] * H.dtype.itemsize), 1)


def _solve_bytes(H: Hessian, k: int) -> int | None:
    """Memory of one more solve like that of `H`, done already; None where that is not known."""
    kept, (P, _) = H.kept_bytes(), H.shape
    if kept is None:
        return None
    basis = (default_ncv(P, k) + 1) * P * H.dtype.itemsize
    return basis + 2 * kept  # a backward pass takes about as much as it is given


def _choose_threads(H: Hessian, k: int, solves: int, memory: int) -> int:
    """Threads for so many solves like that of `H`, done already, which tells what memory one takes.

    All solves count, done or not: rounding depends on how many threads share an operation. There is
    but one where threads would meet in the model, or know nothing of a mode of this one.
    """
    taken = _solve_bytes(H, k)
    if H.device.type != "cpu" or taken is None or not H.threadable():
        return 1
    return max(min(free_threads(), MOST_THREADS, memory // taken, solves), 1)


def _ratio_of_sums(numerators: Tensor, denominators: Tensor) -> tuple[float, float]:
    """``sum(a) / sum(b)`` over (n,) mini-batches and its standard error by the delta method."""
    n, total = len(numerators), denominators.sum()
    ratio = numerators.sum() / total
    deviations = (numerators - ratio * denominators).square().sum()
    factor = n / (n - 1) if n > 1 else float("nan")  # one mini-batch tells nothing about spread
    return float(ratio), float((factor * deviations).sqrt() / total)
