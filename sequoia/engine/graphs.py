"""CUDA graphs: work that is launched whole instead of kernel by kernel."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Work = Callable[[], Tensor]  # reads and writes the same tensors in every call

# Before a capture libraries must have made their handles and workspaces: on the stream that captures, or they would be
# made again within it.
_NUM_WARM_UPS = 2


class Graphs:
    """Captures work on a CUDA device; anywhere else the work itself is called. Used by one thread.

    All graphs share one pool of memory: what one leaves behind may be overwritten by another, so an output is to be
    used, on the current stream, before the next replay of any graph.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)

    def capture(self, work: Work) -> Work:
        """The same work, to be called with its inputs in the tensors that it reads now. Runs it some times."""
        return self._captured(work) if self._device.type == "cuda" else work

    def _captured(self, work: Work) -> Work:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for _ in range(_NUM_WARM_UPS):
                work()
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads of the process may use CUDA meanwhile: a colocated server's, a client's.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            output = work()

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay
