"""What the machine reaches at this moment: how fast it reads memory, how fast it multiplies matrices."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch.nn.functional import linear

from sequoia.engine.model import LoadedModel

_LEAST_BUFFER_BYTES = 512 * 2**20
_NUM_READS = 3
# Wide enough that the product is bound by compute, and on a GPU that its launch does not count.
_MATRIX_WIDTHS = {"cpu": 2048, "cuda": 8192}

Speed = Callable[[], float]


def stream_read(device: torch.device) -> Speed:
    """Bytes per second of reading, with all threads, a buffer that no cache holds.

    Of torch's reductions the sum of int64 computes least for each byte. The buffer is written first: pages that never
    were are all the one page of zeros.
    """
    num_bytes = max(_LEAST_BUFFER_BYTES, 2 * _cache_bytes(device))
    buffer = torch.ones(num_bytes // 8, dtype=torch.int64, device=device)
    return lambda: buffer.nbytes / median(_seconds(buffer.sum, device) for _ in range(_NUM_READS))


def matrix_product(model: LoadedModel) -> Speed:
    """Floating-point operations per second of torch's own product of large square matrices, in the model's dtype.

    In float32 where that is quicker: on a CPU without units for 16 bits torch only imitates them. Quantised layers are
    compared with it too: what they compute beyond it, they compute in fewer bits.
    """
    device, width = model.device, _MATRIX_WIDTHS[model.device.type]
    kinds = dict.fromkeys((model.dtype, torch.float32))
    matrices = [torch.randn((width, width), dtype=dtype, device=device) for dtype in kinds]
    multiplied = [partial(linear, matrix, matrix) for matrix in matrices]
    for product in multiplied:
        product()  # the first one is slow
    fastest = min(multiplied, key=lambda product: _seconds(product, device))
    return lambda: 2 * width**3 / _seconds(fastest, device)


def _seconds(operation: Callable[[], object], device: torch.device) -> float:
    _wait_for(device)
    started = time.perf_counter()
    operation()
    _wait_for(device)
    return time.perf_counter() - started


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _cache_bytes(device: torch.device) -> int:
    """Of all last-level caches together; 0 where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    caches = Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index3")
    sizes = {(each / "shared_cpu_list").read_text(): (each / "size").read_text() for each in caches}
    return sum(int(size.strip().removesuffix("K")) * 1024 for size in sizes.values())
