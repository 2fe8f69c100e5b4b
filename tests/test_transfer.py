"""What travels to a device and back comes out as it went in, in one copy each way."""

from __future__ import annotations

import numpy as np
import torch
from pretend_device import DEVICE, PretendDevice

from sequoia.engine.transfer import download, staged, unpacked, upload

CPU = torch.device("cpu")
ARRAYS = (
    np.array([[1, -2, 2**62]], np.int64),
    np.array([True, False, True]),
    np.array([0.1, np.inf], np.float64),
    np.empty((0, 4), np.int64),
    np.arange(6, dtype=np.float32).reshape(2, 3).T,
    np.array(7, np.int64),
)


def test_arrays_keep_their_shapes_dtypes_and_numbers() -> None:
    packed = unpacked(staged(ARRAYS, CPU), ARRAYS)
    for array, *tensors in zip(ARRAYS, upload(ARRAYS, CPU), packed, strict=True):
        for tensor in tensors:
            np.testing.assert_array_equal(tensor.numpy(), array)
            assert tensor.numpy().dtype == array.dtype


def test_tensors_come_back_as_they_are() -> None:
    tensors = upload(ARRAYS, CPU)
    for array, tensor in zip(ARRAYS, download(tensors), strict=True):
        np.testing.assert_array_equal(tensor, array)
        assert tensor.dtype == array.dtype


def test_everything_goes_in_one_copy_and_comes_in_one() -> None:
    device = PretendDevice()
    with torch.inference_mode(), device:
        download(upload(ARRAYS, DEVICE))
    assert (device.num_uploads, device.num_reads) == (1, 1)


def test_what_is_not_contiguous_is_read_in_its_own_order() -> None:
    [found] = download([torch.arange(6).view(2, 3).T])
    assert found.tolist() == [[0, 3], [1, 4], [2, 5]]
