"""Products on a GPU: recorded as a CUDA graph, and launched as a whole for each vector.

A product with the Hessian of 16 images is some thousand kernels of a few microseconds. To launch
them one by one takes Python several times as long as the GPU needs to run them.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from functools import cached_property

import torch
from torch import Tensor

from lossgeometry.operators.graphs import LinearMap
from lossgeometry.parameters import unflatten_rows
from lossgeometry.running.memory import is_out_of_memory

RowFunction = Callable[[Tensor], Tensor]  # (n, ...) to (n, ...)

# What is kept for a product that occupies all of a device, for each of its multiprocessors: kernels
# then read and write some megabytes each, and take longer than it takes to launch them.
_BYTES = 8 * 2**20
_MULTIPROCESSORS = 132  # where PyTorch does not say


class Recorder:
    """Where functions of one device are recorded: on a stream, and in memory, of their own.

    They share that memory and are replayed one after another: a result is there until the next one
    is computed. A backward pass runs on the streams of its forward pass, and only one stream can be
    recorded, so graphs that are to be recorded have to be made in `stream`, too.
    """

    refused = False  # it has been seen that functions like these cannot be recorded

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        # The pool ends with the last graph in it, and would not come back for the next one.
        self._keeper: torch.cuda.CUDAGraph | None = None

    @contextlib.contextmanager
    def stream(self) -> Iterator[None]:
        """Work on the stream, after all that came before and before all that comes after."""
        caller = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(caller)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            caller.wait_stream(self._stream)

    def rehearse(self, work: Callable[[], Tensor]) -> Tensor:
        """Do `work` on the stream; raise `RuntimeError` if it waits for the GPU.

        A recording that this ends could not be ended properly.
        """
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that not all that waits is seen
            torch.cuda.set_sync_debug_mode("error")
        try:
            with self.stream():
                return work()
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def record(self, function: RowFunction, rows: Tensor) -> RowFunction:
        """The function of all tensors like `rows`, which has been rehearsed."""
        if self._keeper is None:
            self._keeper, _ = self._capture(rows.new_zeros(1).zero_)
        given = rows.clone()
        graph, found = self._capture(lambda: function(given))

        def replay(rows: Tensor) -> Tensor:
            with self.stream():
                given.copy_(rows)
                graph.replay()
            return found

        return replay

    def _capture(self, work: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """A graph of `work`, and its result, which is not computed yet."""
        device = self._stream.device
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        if torch.cuda.mem_get_info(device)[0] < idle:
            torch.cuda.empty_cache()  # it cannot be used by a recording
        graph = torch.cuda.CUDAGraph()
        with self.stream():
            graph.capture_begin(pool=self._pool)
            try:
                result = work()
            except BaseException:
                with contextlib.suppress(RuntimeError):  # it is no reason, but a consequence
                    graph.capture_end()
                raise
            graph.capture_end()
        return graph, result


class Captured:
    """A function of a tensor, recorded at the second call with a shape and replayed from then on.

    It must be a sequence of kernels that depends on the shape alone. Where it cannot be recorded, a
    warning says why, and it is called as it is.

    Parameters
    ----------
    function
        Not to be recorded where there is no `recorder`.
    """

    def __init__(self, function: RowFunction, recorder: Recorder | None) -> None:
        self._function = function
        self._recorder = recorder
        self._rehearsed: set[torch.Size] = set()
        self._recorded: dict[torch.Size, RowFunction] = {}

    def __call__(self, rows: Tensor) -> Tensor:
        """The result may be overwritten by the next call of what shares the recorder."""
        if self._recorder is None or self._recorder.refused:
            with on_stream_of(self._recorder):
                return self._function(rows)
        if rows.shape in self._recorded:
            return self._recorded[rows.shape](rows)
        try:
            if rows.shape not in self._rehearsed:
                result = self._recorder.rehearse(lambda: self._function(rows))
                self._rehearsed.add(rows.shape)
                return result
            self._recorded[rows.shape] = self._recorder.record(self._function, rows)
        except RuntimeError as error:
            if is_out_of_memory(error) and rows.shape not in self._rehearsed:
                raise  # it has nothing to do with the recording
            reason = str(error).strip().splitlines()[0]
            warnings.warn(f"products are not replayed as a CUDA graph: {reason}", stacklevel=2)
            self._recorder.refused = True
        return self(rows)


class RowProducts:
    """Products of a linear map with the rows of a matrix, as many at once as occupy a GPU.

    Parameters
    ----------
    linear_map
        Made in the stream of the `recorder`, if there is one.
    like
        Tensors of the shapes that it takes.
    """

    def __init__(
        self, linear_map: LinearMap, like: dict[str, Tensor], recorder: Recorder | None
    ) -> None:
        def multiply(rows: Tensor) -> Tensor:
            pieces = unflatten_rows(rows, like)
            if len(rows) > 1:
                found = linear_map.apply(pieces, True)
            else:  # without the detour through vmap
                single = linear_map.apply([piece[0] for piece in pieces], False)
                found = [piece[None] for piece in single]
            return torch.cat([piece.flatten(1) for piece in found], dim=1)

        self._multiply = Captured(multiply, recorder)
        self._device = next(iter(like.values())).device
        self._size = linear_map.size

    def add_to(self, product: Tensor, rows: Tensor) -> None:
        """Add the products with `rows` (n, P) to `product` (n, P)."""
        at_once = 1 if len(rows) == 1 else self._at_once
        for into, part in zip(product.split(at_once), rows.split(at_once), strict=True):
            into += self._multiply(part)

    @cached_property
    def _at_once(self) -> int:
        return max(occupying_bytes(self._device) // max(self._size(), 1), 1)


def make_recorder(device: torch.device) -> Recorder | None:
    """A recorder, if there are such for the device."""
    return Recorder(device) if device.type == "cuda" else None


def on_stream_of(recorder: Recorder | None) -> contextlib.AbstractContextManager[None]:
    """Of a `recorder`, if there is one."""
    return contextlib.nullcontext() if recorder is None else recorder.stream()


def occupying_bytes(device: torch.device) -> int:
    """Size of what products have in common, if they occupy all of a GPU."""
    if device.type != "cuda":
        return _BYTES * _MULTIPROCESSORS
    return _BYTES * torch.cuda.get_device_properties(device).multi_processor_count
