"""Large outputs lie in memory for which huge pages were asked: with 4 KB pages, page faults cost more than decoding."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import polydpo_fast
from polydpo_fast.data.buffers import Buffers
from polydpo_fast.memory import fresh_pixels

pytestmark = pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="the kernel was built without huge pages"
)
LARGE = (4, 3, 2048, 2048)  # 100 MB in bfloat16: beyond what malloc keeps in its heap


def is_advised(tensor: torch.Tensor) -> bool:
    """Whether the mapping that holds the middle of the tensor has the kernel's flag `hg`."""
    middle = tensor.data_ptr() + tensor.nbytes // 2
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if span := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(span[1], 16) <= middle < int(span[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return "hg" in line.split()
    raise AssertionError("the tensor is in no mapping")


def test_the_flag_is_off_where_nobody_asked():
    assert not is_advised(torch.empty(LARGE, dtype=torch.bfloat16))


def test_memory_of_pixels():
    assert is_advised(fresh_pixels(LARGE, torch.bfloat16))
    assert is_advised(Buffers(LARGE, torch.bfloat16).take())


def test_the_pixels_of_a_batch():
    file = io.BytesIO()
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(file, "JPEG")
    images = [file.getvalue()] * 2
    assert is_advised(polydpo_fast.decode_pairs(images, images, size=2048).pixels)
    # The caller's memory is left as it is.
    out = torch.empty(LARGE, dtype=torch.bfloat16)
    assert not is_advised(polydpo_fast.decode_pairs(images, images, size=2048, out=out).pixels)


def test_the_gradient_of_a_loss():
    prediction = torch.zeros(2, 1 << 24, requires_grad=True)
    polydpo_fast.loss(prediction, torch.ones(2, 1 << 24), torch.ones(2, 1 << 24), backend="cpp").backward()
    assert prediction.grad is not None
    assert is_advised(prediction.grad)
