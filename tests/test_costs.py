"""What a call costs, counted: a guard that no busy machine can upset. Times are the benchmarks' business.

The bounds are what the code needs now, with a little room; who lowers a cost may lower its bound.
"""

import io
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from loss import allocations
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import polydpo_fast
from polydpo_fast import functional
from polydpo_fast.fused import fast_lane

pytestmark = pytest.mark.skipif(
    "cpp" not in polydpo_fast.available_backends("cpu"), reason="the C++ extension is not built"
)


def tensors(dtype=torch.bfloat16):
    random = torch.Generator().manual_seed(0)
    found = [torch.randn(8, 4, 64, 64, generator=random).to(dtype) for _ in range(3)]
    found[0].requires_grad_()
    return found


def step(batch):
    batch[0].grad = None
    polydpo_fast.loss(*batch).backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_step_allocates_its_gradient_and_no_more_than_a_kilobyte_beside(dtype):
    batch = tensors(dtype)
    step(batch)
    batch[0].grad = None
    given = [size for size in allocations(lambda: polydpo_fast.loss(*batch).backward()) if size > 0]
    gradient = batch[0].numel() * dtype.itemsize
    assert max(given) == gradient
    assert sum(given) - gradient <= 1024
    assert len(given) <= 5


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
        self.names.append(str(operator))
        return operator(*arguments, **(keywords or {}))


def test_a_step_is_two_operators_of_ours_and_what_autograd_adds():
    batch = tensors()
    with Operators() as seen:
        polydpo_fast.loss(*batch).backward()
    ours = [name for name in seen.names if name.startswith("polydpo_fast")]
    assert len(ours) == 2, seen.names
    assert set(seen.names) - set(ours) <= {"aten.ones_like.default", "aten.detach.default"}, seen.names


def python_calls(run):
    """Calls of functions, Python's and C's."""
    count = 0

    def count_calls(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(count_calls)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


def test_a_call_of_a_known_signature_makes_few_python_calls():
    batch = tensors()
    step(batch)
    step(batch)
    forward = python_calls(lambda: polydpo_fast.loss(*batch))
    eager = python_calls(lambda: functional.loss(*batch, backend="reference"))
    assert forward <= 70
    assert forward < eager / 2
    batch[0].grad = None
    assert python_calls(polydpo_fast.loss(*batch).backward) <= 90  # of which PyTorch's own are half


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/test_gpu.py counts the launches themselves")
@pytest.mark.parametrize("options", [{}, {"mask": torch.ones(4, 4, 64, 64, dtype=torch.bool)}], ids=["plain", "mask"])
def test_a_step_on_a_gpu_is_two_launches_and_no_operator_that_is_one(options, monkeypatch):
    """Without a GPU: PyTorch's operators beside the two kernels only give memory, and views of it."""
    pair_loss = pytest.importorskip("polydpo_fast.kernels.pair_loss")
    launched = []

    class Recorder:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *arguments, **constants: launched.append(self.name)

    for name in ("errors_kernel", "gradient_kernel"):
        monkeypatch.setattr(pair_loss, name, Recorder(name))
    kept = torch.zeros(8, dtype=torch.int32)  # as a GPU's counters are, from one call to the next
    monkeypatch.setattr(pair_loss, "counters_of", lambda n_pairs, device: kept)
    batch, one = tensors(), torch.ones(())
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, acc_events=True) as profile:
        torch.autograd.grad(functional.loss(*batch, **options, backend="triton"), batch[0], one)
    assert launched == ["errors_kernel", "gradient_kernel"]
    operators = {event.name for event in profile.events() if event.name.startswith("aten::")}
    memory = {"empty", "empty_strided"}
    views = {"as_strided", "expand", "slice", "to", "view"}  # to: what copies is another operator, _to_copy
    assert operators <= {f"aten::{name}" for name in memory | views}, operators


def photographs(count):
    y, x = np.mgrid[:256, :256] / 256
    pixels = 128 + 60 * np.stack([np.sin(9 * x + 3 * y), np.cos(7 * y + x), np.sin(20 * x * y)], axis=-1)
    pixels += np.random.default_rng(0).normal(0, 4, pixels.shape)
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=92)
    return [file.getvalue()] * count


def test_decoding_into_a_buffer_allocates_no_pixels():
    images = photographs(4)
    out = torch.zeros((8, 3, 256, 256), dtype=torch.bfloat16)

    def run():
        polydpo_fast.decode_pairs(images, images, size=256, out=out, threads=1)

    for _ in range(3):
        run()
    assert sum(size for size in allocations(run) if size > 0) <= 4096
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        run()
    # An image that passed through a buffer of its own would touch 48 pages or more of fresh memory, 80 times.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 800


# ------------------------------------------------------------------------------------------------- instructions

DECODING = """
import ctypes, importlib.util, sys
from types import SimpleNamespace
extension, photograph, count, arguments, bare = sys.argv[1:]
image = open(photograph, "rb").read()
if bare:
    library = ctypes.CDLL(bare)
    library.decode.argtypes = [ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p]
    row = ctypes.create_string_buffer(3 * 256)
    for _ in range(2 * int(count)):
        assert library.decode(image, len(image), row) == 256
else:
    spec = importlib.util.spec_from_file_location("_C", extension)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    out = ctypes.create_string_buffer(2 * 2 * 3 * 256 * 256)
    names = dict.fromkeys(("Draw", "Output", "DecodeLimits"), SimpleNamespace)
    arguments = eval(arguments, names) | {"out": ctypes.addressof(out)}
    arguments["output"].planes = False
    for _ in range(int(count)):
        _, failed, _ = module.decode_pairs([image], [image], **arguments)
        assert not failed
    print(module.build_info()["simd"])
"""
LOSS = """
import ast, ctypes, importlib.util, sys
extension, count, arms, sizes, program, parameters, reduction, passes = sys.argv[1:]
spec = importlib.util.spec_from_file_location("_C", extension)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
read = ast.literal_eval
bound = module.BoundLoss(read(arms), read(sizes), module.Head(*read(program)), read(parameters), read(reduction))
pairs, elements, _ = read(sizes)
ones = [ctypes.create_string_buffer(bytes([0x80, 0x3F]) * (2 * pairs * elements)) for _ in range(4)]  # bfloat16
pred, ref, target, grad = map(ctypes.addressof, ones)
room = [ctypes.create_string_buffer(1 << 16) for _ in range(3)]
loss, metrics, table = map(ctypes.addressof, room)
one = ctypes.c_float(1)
given = {
    "errors": (pred, ref, target, loss, metrics, table, 1),
    "gradient": (pred, target, table, ctypes.addressof(one), 0, grad, 1),
}
for _ in range(int(count)):
    for name in passes.split():
        getattr(bound, name)(*given[name])
print(module.build_info()["simd"])
"""
# What would count differently from run to run: the order of sets, and threads that OpenBLAS keeps spinning.
STEADY = {"PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1"}
# Measured with GCC 12 and libjpeg-turbo 2.1.5: 0.98 and 1.25 times libjpeg-turbo's 35 instructions per pixel. Which
# clones run is valgrind's choice: those of the processors that it knows, AVX2 at most.
MOST_OF_BARE = {"x86-64-v3": 1.04, "baseline": 1.3}
MOST_OF_A_STEP = 4.5  # per element; GCC 12: 3.9, of which 2.2 are the forward pass's, on x86-64-v3

counts_instructions = pytest.mark.skipif(
    shutil.which("valgrind") is None, reason="valgrind, which counts instructions, is not installed"
)


def instructions(script, *arguments):
    """Of a Python without PyTorch that runs the script; and the last line that it prints."""
    command = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", sys.executable, "-c", script]
    command += map(str, arguments)
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **STEADY})
    return int(re.search(r"Collected : (\d+)", done.stderr)[1]), done.stdout.strip()


@counts_instructions
def test_a_step_of_the_loss_takes_few_instructions_per_element(monkeypatch):
    """Forward and backward of SD1.5's size in bfloat16, as often as a step runs each of the two passes over them."""
    from polydpo_fast import _C
    from polydpo_fast.fused import cpu
    from polydpo_fast.fused.programs import program

    given, passes = [], []
    bound = _C.BoundLoss

    class Recorder:
        def __init__(self, arms, sizes, head, parameters, reduction):
            self._bound = bound(arms, sizes, head, parameters, reduction)
            given[:] = arms, sizes, program("poly_dpo"), parameters, reduction

        def errors(self, *addresses):
            passes.append("errors")
            self._bound.errors(*addresses)

        def gradient(self, *addresses):
            passes.append("gradient")
            self._bound.gradient(*addresses)

    monkeypatch.setattr(cpu._C, "BoundLoss", Recorder)
    fast_lane._signature.cache_clear()
    batch = tensors()
    step(batch)
    passes.clear()
    step(batch)
    fast_lane._signature.cache_clear()

    def per_element(passes):
        many, once = (instructions(LOSS, _C.__file__, n, *map(repr, given), " ".join(passes)) for n in (6, 1))
        if once[1] != "x86-64-v3":
            pytest.skip(f"the bound is for x86-64-v3, and this runs as {once[1]}")
        return (many[0] - once[0]) / 5 / batch[0].numel()

    counted, forward = per_element(passes), per_element(["errors"])
    assert forward > 1 / 16  # a vector of 16 elements takes an instruction: something was counted
    assert counted <= MOST_OF_A_STEP
    assert counted + forward > MOST_OF_A_STEP, "the bound would not notice a forward pass that runs twice"


@counts_instructions
def test_the_whole_way_takes_no_more_instructions_than_bare_libjpeg(tmp_path, monkeypatch):
    """From bytes to normalised bfloat16 planes, against libjpeg-turbo that decodes to rows and drops them.

    Counted, of the extension alone in a Python without PyTorch: the difference of five calls and one.
    """
    from polydpo_fast import _C

    given = {}
    decode = _C.decode_pairs

    def recorder(win, lose, *, out, **arguments):
        given.update(arguments)
        return decode(win, lose, out=out, **arguments)

    monkeypatch.setattr(_C, "decode_pairs", recorder)
    (photograph,) = photographs(1)
    polydpo_fast.decode_pairs([photograph], [photograph], size=256, threads=1)
    (tmp_path / "photograph.jpg").write_bytes(photograph)
    bare = tmp_path / "bare_libjpeg.so"
    source = Path(__file__).parent.parent / "benchmarks" / "bare_libjpeg.c"
    flags = subprocess.run(["pkg-config", "--cflags", "--libs", "libjpeg"], capture_output=True, text=True, check=True)
    subprocess.run(["gcc", "-O3", "-shared", "-fPIC", source, "-o", bare, *flags.stdout.split()], check=True)

    def counted(calls, library):
        return instructions(DECODING, _C.__file__, tmp_path / "photograph.jpg", calls, repr(given), library)

    (ours, level), (alone, _) = (counted(5, library) for library in ("", bare))
    ours, alone = ours - counted(1, "")[0], alone - counted(1, bare)[0]
    assert alone > 8 * 256 * 256  # an image takes tens of instructions per pixel: something was counted
    assert ours <= MOST_OF_BARE[level] * alone
