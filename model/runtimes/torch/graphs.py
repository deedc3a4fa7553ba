"""Work that is recorded once and replayed: CUDA graphs where there is a GPU, a plain call elsewhere.

A decode step of the shipped network is 243 small operations, and choosing tokens 69 more. Launched one by one from
Python they keep a GPU waiting; a CUDA graph launches them as one. A graph knows addresses and nothing
else, so all it reads and writes must stay where it is, and its shapes are fixed: there is one for each number of rows
out of a few (`bucket_sizes`), and a batch is padded to the next.

The CUDA half was written from the library's documentation and source (torch 2.13) and has not run on a GPU yet: the
tests marked `cuda` do that where there is one. Elsewhere the tests stand in for it with a recorder that does what a
capture does to the memory it touches.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

WARM_UPS = 3
"""Runs before a capture, in which libraries make their handles and workspaces: forbidden while capturing."""

Work = Callable[[], None]


Recorder = Callable[[Work], Work]
"""Turns work into something that can be launched again and again.

The work must read and write nothing but memory that keeps its address and is not in use. It may be run any number of
times while it is recorded."""


def eager(work: Work) -> Work:
    """Launch work by doing it."""
    return work


class CudaGraphs:
    """Captures work in CUDA graphs that share one pool of memory, since they are never launched at once."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()
        self._pool: Any = None

    def __call__(self, work: Work) -> Work:
        with exact_products():
            # Warmed up on the stream of the capture: cuBLAS keeps a workspace for each stream.
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for _ in range(WARM_UPS):
                    work()
            torch.cuda.current_stream().wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            # By default an allocation anywhere in the process breaks a capture, for instance one by the engine
            # of another model that goes on writing; only this thread's calls can do harm here.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                work()
        self._pool = graph.pool()
        return graph.replay


@contextmanager
def exact_products() -> Iterator[None]:
    """Matrix products in whole fp32: TF32, which training may have turned on, moves logits by more than 1e-3."""
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    products.fp32_precision = "ieee"
    try:
        yield
    finally:
        products.fp32_precision = before


def bucket_sizes(most: int) -> list[int]:
    """The powers of two up to the first that is at least `most`."""
    return [1 << power for power in range((most - 1).bit_length() + 1)]


def cover(count: int, sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Launches, as (first row, rows), that together take in the first `count` rows.

    `sizes` are powers of two in ascending order. One launch if a size is large enough; else as many of the largest
    as are needed, with the last as small as can be.
    """
    launches = []
    first = 0
    while first < count:
        size = next((size for size in sizes if size >= count - first), sizes[-1])
        launches.append((first, size))
        first += size
    return launches
