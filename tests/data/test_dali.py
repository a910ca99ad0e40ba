"""`DaliDecoder` and `choose_decoder`: which is chosen, what they need, copies of them."""

import os
import pickle
import subprocess
import sys

import pytest
import torch

pytest.importorskip("polydpo_fast._C", reason="the C++ extension is not built")
from data.dali_cases import needs_dali

from polydpo_fast import decode_clips, decode_pairs
from polydpo_fast.data.dali import decoder as dali
from polydpo_fast.data.dali.decoder import CppDecoder, DaliDecoder, choose_decoder


def test_choice_without_a_gpu(monkeypatch):
    monkeypatch.setattr(dali, "_has_cuda", lambda: False)
    assert isinstance(choose_decoder(), CppDecoder)
    assert isinstance(choose_decoder("auto", "cpu"), CppDecoder)
    assert choose_decoder("cpp").decode_pairs is decode_pairs
    assert choose_decoder("cpp").decode_clips is decode_clips


@pytest.mark.parametrize(
    ("cuda", "installed", "device", "chosen"),
    [
        (True, True, None, "dali"),
        (True, True, "cuda:0", "dali"),
        (True, True, "cpu", "cpp"),
        (True, False, "cuda", "cpp"),
        (False, True, "cuda", "cpp"),
        (False, True, None, "cpp"),
    ],
)
def test_auto(monkeypatch, cuda, installed, device, chosen):
    monkeypatch.setattr(dali, "_has_cuda", lambda: cuda)
    monkeypatch.setattr(dali, "_is_installed", lambda: installed)
    monkeypatch.setattr(dali, "DaliDecoder", lambda device, threads: ("dali", device, threads))
    decoder = choose_decoder("auto", device, 3)
    assert isinstance(decoder, CppDecoder) if chosen == "cpp" else decoder == ("dali", device, 3)


def test_without_dali(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    assert not dali._is_installed()
    with pytest.raises(ImportError, match=r"pip install 'polydpo-fast\[dali\]'$"):
        choose_decoder("dali", "cpu")


def test_a_dali_that_does_not_load(tmp_path):
    """What is the matter with it is not hidden."""
    package = tmp_path / "nvidia" / "dali"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("import a_library_that_is_not_there")
    code = "from polydpo_fast.data import choose_decoder; choose_decoder('dali', 'cpu')"
    where = {**os.environ, "PYTHONPATH": str(tmp_path)}
    ended = subprocess.run([sys.executable, "-c", code], env=where, capture_output=True, text=True)
    assert ended.returncode == 1
    assert "[dali]' (No module named 'a_library_that_is_not_there')" in ended.stderr


@pytest.mark.parametrize("kind", ["auto", "cpp", "dali"])
def test_a_device_that_is_none(monkeypatch, kind):
    monkeypatch.setattr(dali, "_import_dali", lambda: None)
    with pytest.raises(ValueError, match="device is 'nonsense'; expected 'cpu', 'cuda', 'cuda:1'"):
        choose_decoder(kind, "nonsense")


def test_bad_choice():
    with pytest.raises(ValueError, match="decoder is 'nvjpeg'; expected one of 'auto', 'cpp', 'dali'"):
        choose_decoder("nvjpeg")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(device="meta"), "device is 'meta'; expected 'cpu', 'cuda', 'cuda:1'"),
        (dict(device="no"), "device is 'no'; expected 'cpu'"),
        (dict(device="cpu", canary=0), "canary is 0; expected an int from 1"),
        (dict(device="cpu", threads=0), "threads is 0; expected an int from 1"),
        (dict(device="cpu", hardware_load=2), "hardware_load is 2; expected a number from 0 to 1"),
    ],
)
def test_bad_arguments_of_the_decoder(monkeypatch, arguments, message):
    monkeypatch.setattr(dali, "_import_dali", lambda: None)
    with pytest.raises(ValueError, match=message):
        DaliDecoder(**arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there(monkeypatch):
    monkeypatch.setattr(dali, "_import_dali", lambda: None)
    with pytest.raises(ValueError, match="device is 'cuda'; but PyTorch finds no CUDA device here"):
        DaliDecoder("cuda")


@needs_dali
def test_it_can_be_pickled():
    copy = pickle.loads(pickle.dumps(DaliDecoder("cpu", 1, canary=7, hardware_load=0.5)))
    engine = copy._engine
    assert (copy.device, engine.threads, engine.canary, engine.hardware_load) == (torch.device("cpu"), 1, 7, 0.5)


CHILDREN = """
import gc, io, os
import numpy as np
from PIL import Image
from polydpo_fast.data import DaliDecoder

def child(work):
    pid = os.fork()
    if pid == 0:
        work()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0

file = io.BytesIO()
Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(file, "jpeg")
held = [DaliDecoder("cpu", 2, canary=None)]
decode = lambda: [held[0].decode_pairs([file.getvalue()], [file.getvalue()], size=32) for _ in range(2)]
decode()
child(decode)
child(lambda: (held.clear(), gc.collect()))
with held[0]._engine._lock:
    child(decode)
decode()
print("done")
"""


@needs_dali
def test_forked_processes_have_pipelines_of_their_own():
    """Those of their parent have threads that are not there: to use or to destroy them would never end."""
    ended = subprocess.run([sys.executable, "-c", CHILDREN], capture_output=True, text=True, timeout=100)
    assert ended.stdout == "done\n", ended.stderr
