"""What processes that work on one thing ask of each other; of one alone, which needs no PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

Result = TypeVar("Result")


class Team:
    """The processes that share a computation; here one, to which all of this is trivial.

    Everyone makes the same calls in the same order, and everyone gets the same results, to the
    last bit; where an exception is the result, everyone raises it. `LostProcessError` is raised if
    one of the others is gone.

    Attributes
    ----------
    rank, size : int
        Which of how many processes this one is.
    """

    rank, size = 0, 1

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its sum over the processes, in place; returns it."""
        return tensor

    def shard(self, n: int) -> slice:
        """Which of `n` consecutive things are this process's; shares differ by at most one."""
        bounds = [rank * n // self.size for rank in (self.rank, self.rank + 1)]
        return slice(*bounds)

    def collect(self, piece: Tensor, n: int) -> Tensor:
        """The (n,) tensor of which every process holds its `shard`."""
        return piece

    def share(self, n: int, work: Callable[[int], Result]) -> Iterator[tuple[int, Result]]:
        """Yield ``(i, work(i))`` for every i below `n`, in no particular order, on every process.

        A process that is done with one thing takes the next that nobody has begun: a slow one does
        not hold up the others. Results travel pickled, and should be small.
        """
        for i in range(n):
            yield i, work(i)

    def first(self, work: Callable[[], Result]) -> Result:
        """What the first process makes of something that must be done once, on every process."""
        return work()


ALONE = Team()
