"""Whether what Locality Landscapes says of a problem is true, and leaves it as it was."""

from __future__ import annotations

import math
import random
import re
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lossgeometry import GGN, Hessian, line
from lossgeometry.errors import InputError
from tests.networks.problems import Problem, make_problem
from tests.networks.truth import Truth, flat

# What rounding may do, if it does not do as much to plain PyTorch or to the truth, of weights that
# are rounded; that many times as much.
EXACT = 1e-8
TIMES = 20
ROUNDING = {torch.float64: EXACT, torch.float32: 1e-4, torch.bfloat16: 0.1}
ULPS = {torch.float64: 4, torch.float32: 1, torch.bfloat16: 1}
# Of a size far below this errors are absolute, for it is made of larger terms that cancel.
SMALL = {torch.float64: 1e-3, torch.float32: 1e-4, torch.bfloat16: 1e-6}
CONFIRMED = 1e-4  # by finite differences
STEP = 1e-3


@dataclass
class Verdict:
    """On one problem: what is wrong, and what was refused, each by what was asked."""

    text: str
    wrong: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def outcome(self) -> str:
        """In one word."""
        return "wrong" if self.wrong else "refused" if self.refused else "right"


def judge(seed: int) -> Verdict:
    """Products, gradients and a line through the weights of the problem of this seed."""
    return _Trial(make_problem(seed)).verdict


class _Trial:
    def __init__(self, problem: Problem) -> None:
        self.verdict = Verdict(problem.text)
        self._problem = problem
        self._precise, self._plain = (Truth(problem.twin(precise=p)) for p in (True, False))
        generator = torch.Generator().manual_seed(0)
        self._vectors = [self._plain.vector(generator) for _ in range(2)]
        self._exact_vectors = [[piece.double() for piece in v] for v in self._vectors]
        decay = problem.options.get("weight_decay", 0.0)
        self._penalty = decay * torch.stack([flat(v) for v in self._exact_vectors])
        self._sloping = decay * flat([p.detach() for p in self._precise.parameters])
        before = _state(problem)
        self._ask("hessian", self._hessian)
        self._ask("line", self._line)
        if problem.loss is not None:
            self._ask("ggn", self._ggn)
        for what, then in _state(problem).items():
            if not _equal(then, before[what]):
                self.verdict.wrong[f"state of {what}"] = "changed"

    def _ask(self, what: str, question: Callable[[], None]) -> None:
        try:
            question()
        except InputError as error:
            self.verdict.refused[what] = str(error)
        except Exception:
            self.verdict.wrong[what] = traceback.format_exc()

    def _operator(self, kind: Any) -> Any:
        problem = self._problem
        return kind(problem.given, problem.loss, problem.data(), **problem.how, **problem.options)

    def _products(self, operator: Any) -> Tensor:
        V = torch.stack([flat(v) for v in self._vectors], 1)
        return (operator @ V).T.double()

    def _hessian(self) -> None:
        H = self._operator(Hessian)
        found = self._products(H)
        self._compare(
            "gradient",
            H.gradient().double(),
            self._precise.gradient() + self._sloping,
            lambda truth: truth.gradient().double() + self._sloping,
        )
        exact = self._precise.hessian_products(self._exact_vectors)
        if not self._confirmed(exact[0]):
            self._unconfirmed(H, found[0] - self._penalty[0])
            return
        self._compare(
            "hessian",
            found,
            exact + self._penalty,
            lambda truth: truth.hessian_products(self._like(truth)).double() + self._penalty,
        )

    def _confirmed(self, exact: Tensor) -> bool:
        """Whether finite differences agree with double backward."""
        direction = self._exact_vectors[0]
        return (
            _error(exact, self._precise.difference(direction, 1e-5)) <= CONFIRMED
            or _error(exact, self._nearest_difference(exact)) <= CONFIRMED
        )

    def _nearest_difference(self, product: Tensor) -> Tensor:
        """No step makes what is false agree, and rounding or a kink some that is true disagree."""
        differences = [
            self._precise.difference(self._exact_vectors[0], 10.0**-k, order)
            for order, exponents in ((4, (2, 3, 4, 5)), (2, (6, 7, 8)))
            for k in exponents
        ]
        return min(differences, key=lambda difference: _error(product, difference))

    def _unconfirmed(self, H: Any, found: Tensor) -> None:
        """PyTorch's own second derivative is wrong here, or there is none."""
        allowed = max(CONFIRMED, TIMES * ROUNDING[self._problem.dtype])
        error = _error(found, self._nearest_difference(found))
        if error <= allowed:
            return
        check = H.check()
        if not check.ok:
            self.verdict.refused["hessian"] = f"check: {check.verdict}"
        elif error > TIMES * check.tolerance:
            self.verdict.wrong["hessian"] = f"off by {error:.1e}, and check says it is {check}"

    def _ggn(self) -> None:
        found = self._products(self._operator(GGN))
        self._compare(
            "ggn",
            found,
            self._precise.ggn_products(self._exact_vectors) + self._penalty,
            lambda truth: truth.ggn_products(self._like(truth)).double() + self._penalty,
        )

    def _line(self) -> None:
        problem = self._problem
        how = {name: value for name, value in problem.how.items() if name != "params"}
        names = {id(p): n for n, p in self._plain._problem.model.named_parameters()}
        direction = {
            names[id(p)]: piece
            for p, piece in zip(self._plain.parameters, self._vectors[0], strict=True)
        }
        steps = [-STEP, 0.0, STEP] if problem.dtype == torch.float64 else [0.0]
        found = line(problem.given, {"loss": problem.loss}, problem.data(), direction, steps, **how)
        exact = [self._precise.value(step, self._exact_vectors[0]) for step in steps]
        self._compare(
            "line",
            torch.from_numpy(found["loss"]),
            torch.stack(exact),
            lambda truth: torch.stack([truth.value(s, self._like(truth)[0]) for s in steps]),
        )

    def _like(self, truth: Truth) -> list[list[Tensor]]:
        """The vectors, in its precision."""
        return self._vectors if truth is self._plain else self._exact_vectors

    def _compare(
        self, what: str, found: Tensor, exact: Tensor, of: Callable[[Truth], Tensor]
    ) -> None:
        dtype = self._problem.dtype
        small = SMALL[dtype]
        error = _error(found, exact, small)
        if error <= ROUNDING[dtype]:
            return
        truths = (self._plain, _nearby(self._problem))
        rounded = [_error(of(truth), exact, small) for truth in truths]
        allowed = max(ROUNDING[dtype], *(TIMES * size for size in rounded))
        if not error <= allowed:
            self.verdict.wrong[what] = f"off by {error:.1e}, expected at most {allowed:.1e}"


def _nearby(problem: Problem) -> Truth:
    """The truth of weights that are some ulps of the model's precision away."""
    twin = problem.twin(precise=True)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in twin.model.parameters():
            noise = torch.randn(p.shape, generator=generator).to(p)
            p.mul_(1 + ULPS[problem.dtype] * torch.finfo(problem.dtype).eps * noise)
    return Truth(twin)


def _error(found: Tensor, exact: Tensor, small: float = 1e-6) -> float:
    """Relative to the size of what is right, or to a small number where that is nothing."""
    if not found.isfinite().all() or not exact.isfinite().all():
        same = torch.equal(found.isfinite(), exact.isfinite())
        return 0.0 if same else math.inf
    return float((found - exact).norm() / (exact.norm() + small))


def _state(problem: Problem) -> dict[str, Any]:
    """All that has to stay as it is."""
    model = problem.model
    _, keys, *place = np.random.get_state()  # noqa: NPY002
    return {
        "parameters": {n: p.detach().clone() for n, p in model.named_parameters()},
        "buffers": {n: b.clone() for n, b in model.named_buffers()},
        "requires_grad": {n: p.requires_grad for n, p in model.named_parameters()},
        "grad": {n: p.grad is None for n, p in model.named_parameters()},
        "places": {n: p.data_ptr() for n, p in model.named_parameters()},
        "modes": [m.training for m in model.modules()],
        "data": [t.clone() for t in pytree.tree_leaves(problem.batches)],
        "random numbers": (torch.get_rng_state(), random.getstate(), keys, place),
        "gradient mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "kernels": torch.backends.mha.get_fastpath_enabled(),
        "threads": torch.get_num_threads(),
    }


def _equal(a: Any, b: Any) -> bool:
    ours, theirs = pytree.tree_leaves(a), pytree.tree_leaves(b)
    return len(ours) == len(theirs) and all(
        torch.equal(torch.as_tensor(x), torch.as_tensor(y)) if not isinstance(x, str) else x == y
        for x, y in zip(ours, theirs, strict=True)
        if x is not None
    )


def reason(message: str) -> str:
    """A refusal without its numbers and names."""
    message = re.sub(r"\d[\d.e+-]*", "N", message)
    return re.sub(r"\b[\w.]*\.\w*(?= normalises)|\bmodel(?= normalises)", "...", message)
