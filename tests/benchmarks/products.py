"""The matrix products inside a computation, and how long they take on their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Products(TorchDispatchMode):
    """Shapes of the operands of every matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[Sequence[int], Sequence[int]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
            self.shapes.append((args[0].shape, args[1].shape))
        elif func is torch.ops.aten.addmm.default:
            self.shapes.append((args[1].shape, args[2].shape))
        elif func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default:
            query, key, value = args[:3]
            scores = (*query.shape[:-1], key.shape[-2])
            self.shapes += [(query.shape, key.mT.shape), (scores, value.shape)]
        return func(*args, **(kwargs or {}))

    def alone(self) -> Callable[[], None]:
        """A function that makes the same products of random matrices, and nothing else."""
        operands = [(torch.randn(a), torch.randn(b)) for a, b in self.shapes]
        results = [a @ b for a, b in operands]

        def multiply() -> None:
            for (a, b), result in zip(operands, results, strict=True):
                torch.matmul(a, b, out=result)

        return multiply
