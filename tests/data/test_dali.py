"""`DaliDecoder` against the C++ decoder, on DALI's CPU operators; and what holds without DALI."""

import io
import itertools
import os
import pickle
import struct
import subprocess
import sys

import pytest
import torch
from image_oracle import jpeg, picture, png
from PIL import Image

pytest.importorskip("polydpo_fast._C", reason="the C++ extension is not built")
from polydpo_fast import _C, DecodeError, DecodeLimits, decode_clips, decode_pairs
from polydpo_fast.data import dali, dali_clips, dali_images, dali_sides
from polydpo_fast.data.dali import CanaryError, CppDecoder, DaliDecoder, choose_decoder
from polydpo_fast.data.dali_engine import Engine
from polydpo_fast.decode_arguments import Output
from polydpo_fast.draws import Draw, draw_of

LEVELS = dict(dtype=torch.float32, mean=0.0, std=1 / 255)  # pixels are levels of 255, not rounded
LIMITS = DecodeLimits()
CENTRE = Draw(True, 0, 0, False)

needs_dali = pytest.mark.skipif(not dali._is_installed(), reason="nvidia-dali is not installed")


@pytest.fixture(scope="module")
def decoder():
    if not dali._is_installed():
        pytest.skip("nvidia-dali is not installed")
    return DaliDecoder("cpu", threads=2, canary=1)


@pytest.fixture
def in_cpp(monkeypatch):
    """Counts the pairs of images that go through C++; canaries among them."""
    seen = []
    monkeypatch.setattr(
        dali_images, "decode_pairs", lambda win, *a, **k: seen.append(len(win)) or decode_pairs(win, *a, **k)
    )
    return seen


def oriented(orientation, shape=(61, 83), **options):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return jpeg(picture(*shape, seed=orientation), exif=exif, **options)


def assert_same_facts(a, b, *names):
    for name in ("ok", "original_size", "crop_top_left", "flipped", *names):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert a.errors == b.errors


# ------------------------------------------------------------------------------------ what DALI may be given


def plans(*images, draws=(CENTRE,), size=(32, 32), resize="cover", limits=LIMITS):
    output = Output(size, resize, "bilinear", "uint8", (0, 0, 0), (1, 1, 1), (0, 0, 0))
    return _C.foreign_plans(images, draws=draws, output=output, apply_orientation=True, limits=limits)


def is_for_dali(image, **options):
    return plans(image, **options)[0] is not None


@pytest.mark.parametrize(
    "image",
    [
        jpeg(picture(61, 83), subsampling=0),
        jpeg(picture(61, 83), subsampling=1),
        jpeg(picture(61, 83), subsampling=2),
        jpeg(picture(61, 83), progressive=True),
        jpeg(picture(61, 83), restart_marker_blocks=2),
        *(jpeg(picture(61, 83), subsampling=s, restart_marker_blocks=1) for s in range(3)),
        *(jpeg(picture(61, 83), subsampling=s, progressive=True, restart_marker_blocks=1) for s in range(3)),
        jpeg(picture(61, 83).convert("L")),
        jpeg(picture(61, 83).convert("L"), restart_marker_blocks=3),
        jpeg(picture(61, 83)) + b"what follows the end is not looked at",
    ],
)
def test_common_jpegs_are_for_dali(image):
    assert is_for_dali(image)
    assert (plans(image)[0]["height"], plans(image)[0]["width"]) == (61, 83)


def changed(marker, offset, value):
    """A JPEG with another byte at that offset from a marker."""
    image = bytearray(jpeg(picture(61, 83), subsampling=0))
    image[image.index(marker) + offset] = value
    return bytes(image)


RESTARTED = jpeg(picture(61, 83), subsampling=0, restart_marker_blocks=22)  # 4 times


@pytest.mark.parametrize(
    "image",
    [
        b"",
        b"\xff\xd8\xff",
        png(picture(61, 83)),
        jpeg(picture(61, 83).convert("CMYK")),
        jpeg(picture(61, 83), keep_rgb=True),
        changed(b"\xff\xc0", 1, 0xC9),  # arithmetic coding
        changed(b"\xff\xc0", 4, 12),  # bits per sample
        changed(b"\xff\xc0", 11, 0x41),  # 4:1:1
        changed(b"\xff\xda", 1, 0xD8),  # no scan, but a second start
        changed(b"\xff\xda", 11, 1),  # a scan without the first coefficient
        changed(b"\xff\xda", 12, 62),  # and without the last one
        changed(b"\xff\xda", 13, 1),  # and without a bit
        RESTARTED.replace(b"\xff\xd1", b"\xff\xd6"),
        RESTARTED.replace(b"\xff\xd1", b""),
        RESTARTED.replace(b"\xff\xd9", b"\xff\xd4\xff\xd9"),
    ],
)
def test_others_are_not(image):
    assert not is_for_dali(image)


@pytest.mark.parametrize("options", [dict(), dict(progressive=True), dict(restart_marker_blocks=1)], ids=str)
def test_no_truncated_jpeg_is_for_dali(options):
    """Every length; a thumbnail's end-of-image marker in the EXIF is not the image's."""
    thumbnail = Image.Exif()
    thumbnail[0x010E] = "\xff\xd9" * 3
    whole = jpeg(picture(24, 40), exif=thumbnail, **options)
    assert is_for_dali(whole)
    assert not [length for length in range(len(whole)) if is_for_dali(whole[:length])]


def test_limits_are_those_of_the_cpp_decoder():
    image = jpeg(picture(61, 83), progressive=True)
    assert is_for_dali(image, limits=DecodeLimits(61 * 83, len(image), 10))
    for tight in (
        dict(pixels=61 * 83 - 1),
        dict(bytes=len(image) - 1),
        dict(decoded=100),
        dict(scans=9),
    ):
        assert not is_for_dali(image, limits=DecodeLimits(**tight))
    few = DecodeLimits(decoded=1000)  # as little as a baseline JPEG takes, until it is resized
    assert is_for_dali(jpeg(picture(32, 32)), limits=few)
    assert not is_for_dali(jpeg(picture(61, 83)), limits=few)


def test_what_does_not_fit_is_left_to_cpp():
    assert not is_for_dali(jpeg(picture(20, 40)), resize=None)
    assert is_for_dali(jpeg(picture(32, 32)), resize=None)


def test_the_plan_is_the_one_that_cpp_follows():
    """The corner that it tells is the corner that decode_pairs reports, whatever the orientation and the draw."""
    images, seeds = [oriented(o) for o in range(1, 9)], range(8)
    options = dict(size=(32, 48), crop="random", hflip=0.5, seeds=seeds)
    known = decode_pairs(images, images, **options)
    found = plans(*images, draws=[draw_of(seed, "random", 0.5) for seed in seeds], size=(32, 48))
    assert [[plan["top"], plan["left"]] for plan in found] == known.crop_top_left[:8].tolist()
    assert [plan["transposed"] for plan in found] == [orientation >= 5 for orientation in range(1, 9)]


# --------------------------------------------------------------------------------------------- the choice


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


# -------------------------------------------------------------------------------------------------- images

SHAPES = [((300, 200), 128), ((61, 83), (31, 50)), ((64, 64), 200), ((300, 41), 64), ((700, 700), 64)]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("shape", "size"), SHAPES)
@pytest.mark.parametrize("resize", ["cover", "contain", "stretch"])
def test_resized_pixels_are_those_of_cpp(decoder, shape, size, resize, interpolation):
    """All orientations, mirrored or not. The filters are the same; that of C++ across is rounded: 1/32 level, of the
    cubic one, whose second pass enlarges it by up to 1.3, a bit more."""
    win = [oriented(o, shape, subsampling=o % 3) for o in range(1, 9)]
    lose = [oriented(9 - o, shape, progressive=True) for o in range(1, 9)]
    options = dict(size=size, resize=resize, interpolation=interpolation, crop="random", hflip=0.5, seeds=range(8))
    a = decode_pairs(win, lose, background=(3, 99, 200), **LEVELS, **options)
    b = decoder.decode_pairs(win, lose, background=(3, 99, 200), **LEVELS, **options)
    assert_same_facts(a, b)
    assert (a.pixels - b.pixels).abs().max() <= 0.05


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(64, 64), (8, 8), (1, 1), (512, 40), (20, 700), (128, 1000)])
def test_sharp_edges_at_the_border_are_those_of_cpp(decoder, size, interpolation):
    """Where a filter leaves the image, and where it overshoots: of both passes in their order."""
    framed = Image.new("RGB", (512, 384), "black")
    framed.paste("white", (1, 1, 511, 383))
    framed.paste("black", (200, 100, 203, 240))
    image = jpeg(framed, quality=100, subsampling=0)
    options = dict(size=size, resize="stretch", interpolation=interpolation, **LEVELS)
    a, b = decode_pairs([image], [image], **options), decoder.decode_pairs([image], [image], **options)
    assert (a.pixels - b.pixels).abs().max() <= 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.uint8])
@pytest.mark.parametrize("resize", [None, "cover", "contain"])
def test_pixels_that_are_not_resized_are_the_same_bits(decoder, in_cpp, dtype, resize):
    """All orientations and samplings, from the inside of a JPEG too; or with padding on two sides."""
    size = {None: (40, 48), "cover": (61, 83), "contain": (61, 120)}[resize]
    images = [oriented(o if resize is None else 1 + (o - 1) % 4, subsampling=o % 3) for o in range(1, 9)]
    options = dict(size=size, resize=resize, crop="random", hflip=0.5, seeds=range(8), dtype=dtype)
    options |= dict(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), background=(9, 8, 7))
    a, b = decode_pairs(images, images[::-1], **options), decoder.decode_pairs(images, images[::-1], **options)
    assert_same_facts(a, b)
    assert torch.equal(a.pixels, b.pixels)
    assert in_cpp == [1] * 8  # the canaries alone


@pytest.mark.parametrize("column", [0, 7])
def test_crops_of_one_column(decoder, column, monkeypatch):
    image = jpeg(picture(61, 83), subsampling=2)
    draw = Draw(False, 0, (column << 32) // 83, False)
    monkeypatch.setattr("polydpo_fast.decode_arguments.draw_of", lambda *_: draw)
    options = dict(size=(50, 1), resize=None, crop="random")
    a, b = decode_pairs([image], [image], **options), decoder.decode_pairs([image], [image], **options)
    assert abs(int(a.crop_top_left[0, 1]) - column) <= 1
    assert torch.equal(a.pixels, b.pixels)


def test_large_batches_are_decoded_in_parts(decoder, in_cpp, monkeypatch):
    """So that what is decoded is bounded, whatever the images are resized to."""
    runs, run = [], dali_images._run
    monkeypatch.setattr(dali_images, "_run", lambda engine, rows, *a: runs.append(len(rows)) or run(engine, rows, *a))
    monkeypatch.setattr(dali_images, "_RUN_BYTES", 3 * 3 * 60 * 60)
    images = [jpeg(picture(60, 60, seed=i)) for i in range(4)] + [jpeg(picture(300, 300))]
    options = dict(size=60)
    a, b = decode_pairs(images, images, **options), decoder.decode_pairs(images, images, **options)
    assert sorted(runs) == [1, 1, 1, 1, 3, 3]
    assert in_cpp == [1] * 5
    assert (a.pixels - b.pixels).abs().max() < 0.005


def test_the_default_device_does_not_matter(decoder, clips):
    image = jpeg(picture(48, 48))
    with torch.device("meta"):
        assert decoder.decode_pairs([image], [image], size=32).ok.all()
        assert decoder.decode_clips([clips["small"]], [clips["small"]], frames=2, size=32).ok.all()


def test_seeds_are_drawn_once(decoder):
    """One pair by DALI and one by C++, without seeds: torch.manual_seed decides, as for decode_pairs."""
    win, lose = [jpeg(picture(60, 60)), png(picture(60, 60))], [jpeg(picture(60, 60))] * 2
    options = dict(size=(30, 30), resize=None, crop="random", hflip=0.5)
    torch.manual_seed(5)
    a = decode_pairs(win, lose, **options)
    torch.manual_seed(5)
    b = decoder.decode_pairs(win, lose, **options)
    assert_same_facts(a, b)
    assert torch.equal(a.pixels, b.pixels)


@pytest.mark.parametrize("resize", [None, "cover"])
def test_what_is_not_for_dali_goes_through_cpp(decoder, in_cpp, resize):
    good = jpeg(picture(48, 48))
    win = [good, png(picture(48, 48)), good, good, jpeg(picture(50, 48).convert("CMYK"))]
    lose = [good, good, good[:-9], b"no image", good]
    options = dict(size=48 if resize is None else 32, resize=resize, on_error="mask")
    a, b = decode_pairs(win, lose, **options), decoder.decode_pairs(win, lose, **options)
    assert_same_facts(a, b)
    assert b.ok.tolist() == [True, True, False, False, True]
    assert in_cpp == [4, 1]  # and the canary
    assert (a.pixels - b.pixels).abs().max() < 0.005  # half a bfloat16's last bit
    with pytest.raises(DecodeError, match=r"lose\[2\] could not be decoded"):
        decoder.decode_pairs(win, lose, size=32)


def test_what_dali_chokes_on_costs_its_own_pair(decoder, in_cpp):
    """The quantisation tables are turned into comments: whole, by its markers, and not decodable."""
    good = jpeg(picture(48, 48))
    bad = good.replace(b"\xff\xdb", b"\xff\xfe")
    assert is_for_dali(bad)
    win, lose = [good] * 7, [good] * 3 + [bad] + [good] * 3
    got = decoder.decode_pairs(win, lose, size=48, on_error="mask")
    assert got.ok.tolist() == [True] * 3 + [False] + [True] * 3
    assert [(e.arm, e.index) for e in got.errors] == [("lose", 3)]
    assert sum(in_cpp) == 1 + 6  # itself, and the canaries
    assert not got.pixels[3].any()
    assert not got.pixels[7 + 3].any()
    assert torch.equal(got.pixels[4], decode_pairs([good], [good], size=48).pixels[0])
    assert decoder.decode_pairs([good], [good], size=48).ok.all()  # it works after that


def test_a_dali_that_decodes_nothing_is_told_of(decoder, monkeypatch):
    def broken(*_):
        raise RuntimeError("Critical error\nwhich was used in\n  a file\nencountered:\n\nout of\nmemory")

    monkeypatch.setattr(dali_images, "_run", broken)
    image = jpeg(picture(48, 48))
    with pytest.warns(
        UserWarning, match="DALI decoded none of the images of a batch that C.. could decode: out of memory$"
    ):
        got = decoder.decode_pairs([image], [image], size=32)
    assert torch.equal(got.pixels, decode_pairs([image], [image], size=32).pixels)


def test_into_a_buffer(decoder):
    image = jpeg(picture(48, 48))
    with torch.inference_mode():
        kept = torch.empty((2, 3, 32, 32), dtype=torch.float16)
    for out in (torch.full((2, 3, 32, 32), 9, dtype=torch.float16), kept):
        got = decoder.decode_pairs([image], [image], size=32, dtype=torch.float16, out=out)
        assert got.pixels is out
        assert out.abs().max() <= 1
    for wrong, message in (
        (torch.empty((2, 3, 32, 31), dtype=torch.float16), "out has shape"),
        (torch.empty((2, 3, 32, 32)), "out has dtype"),
        (torch.empty((2, 3, 32, 32), dtype=torch.float16, device="meta"), "expected a contiguous CPU tensor"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            decoder.decode_pairs([image], [image], size=32, dtype=torch.float16, out=wrong)


def test_planes_are_those_of_cpp(decoder):
    image = jpeg(picture(48, 48), subsampling=2)
    options = dict(size=32, resize=None, dtype="yuv420")
    a, b = decode_pairs([image], [image], **options), decoder.decode_pairs([image], [image], **options)
    assert torch.equal(a.pixels, b.pixels)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        (dict(win=[]), ValueError, "lose has 1 images; expected 0 like win"),
        (dict(lose=["x"]), TypeError, r"lose\[0\] is a str; expected a contiguous bytes-like object"),
        (dict(size=0), ValueError, "size is 0"),
        (dict(resize="crop"), ValueError, "resize is 'crop'"),
        (dict(interpolation="nearest"), ValueError, "interpolation is 'nearest'"),
        (dict(dtype=torch.float64), TypeError, "dtype is torch.float64"),
        (dict(seeds=[1, 2]), ValueError, "seeds has 2 numbers; expected 1"),
        (dict(seeds=7, crop="random"), TypeError, "seeds is 7; expected a sequence"),
        (dict(strict=1), TypeError, "strict is 1"),
        (dict(limits=3), TypeError, "limits is a int; expected a DecodeLimits"),
        (dict(std=0), ValueError, "std is 0"),
        (dict(background=(1, 2)), ValueError, "background is"),
        (dict(on_error="skip"), ValueError, "on_error is 'skip'"),
        (dict(frames=3), TypeError, "there is no option 'frames'; expected any of size, resize"),
        (dict(threads=0), ValueError, "threads is 0; expected an int from 1"),
        (dict(limits=DecodeLimits(pixels=9)), DecodeError, "limits.pixels"),
    ],
)
def test_bad_arguments(decoder, changed, error, message):
    image = jpeg(picture(40, 40))
    given = dict(win=[image], lose=[image], size=32) | changed
    with pytest.raises(error, match=message):
        decoder.decode_pairs(given.pop("win"), given.pop("lose"), **given)


@needs_dali
def test_it_can_be_pickled():
    copy = pickle.loads(pickle.dumps(DaliDecoder("cpu", 1, canary=7, hardware_load=0.5)))
    engine = copy._engine
    assert (copy.device, engine.threads, engine.canary, engine.hardware_load) == (torch.device("cpu"), 1, 7, 0.5)


# -------------------------------------------------------------------------------------------------- canary


@needs_dali
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16])
def test_the_canary_sees_one_wrong_tile(dtype, monkeypatch):
    """A block of 16 x 16 pixels, one of 64, is off by 10 levels in one channel; 6 are let pass."""
    decoder, image = DaliDecoder("cpu", 1), jpeg(picture(128, 128))
    run = dali_images._run
    for off, seen in ((10, True), (6, False)):

        def tampered(*arguments, off=off):
            levels = [x.clone() for x in run(*arguments)]
            levels[1][32:48, 64:80, 1] = 100 + off
            return levels

        known = Image.open(io.BytesIO(image))
        pixels = known.load()
        for y, x in itertools.product(range(32, 48), range(64, 80)):
            pixels[x, y] = (*pixels[x, y][:1], 100, pixels[x, y][2])
        exact = png(known)
        monkeypatch.setattr(dali_images, "_run", tampered)
        monkeypatch.setattr(
            dali_images, "decode_pairs", lambda win, _, exact=exact, **o: decode_pairs(win, [exact], **o)
        )
        decoder._engine._pairs = itertools.count()
        if seen:
            with pytest.raises(CanaryError, match=r"lose\[0\] is decoded by DALI into other pixels.*1\d\.\d levels"):
                decoder.decode_pairs([image], [image], size=128, dtype=dtype)
        else:
            assert decoder.decode_pairs([image], [image], size=128, dtype=dtype).ok.all()


@needs_dali
@pytest.mark.parametrize(("canary", "expected"), [(4, 3), (1, 10), (None, 0)])
def test_the_canary_comes_by_count(in_cpp, canary, expected):
    decoder, image = DaliDecoder("cpu", 1, canary=canary), jpeg(picture(32, 32))
    for _ in range(5):
        decoder.decode_pairs([image] * 2, [image] * 2, size=32)
    assert len(in_cpp) == expected


@needs_dali
def test_damage_that_only_cpp_sees_is_no_wrong_pixel():
    """Flipped bits: C++ refuses the pair in strict mode, DALI does not notice; documented."""
    image = bytearray(jpeg(picture(64, 64), restart_marker_blocks=4))
    place = image.index(b"\xff\xd1") + 12
    image[place : place + 3] = b"\x55\x55\x55"
    with pytest.raises(DecodeError):
        decode_pairs([image], [image], size=64)
    assert DaliDecoder("cpu", 1, canary=1).decode_pairs([image], [image], size=64).ok.all()


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


# --------------------------------------------------------------------------------------------------- clips


@pytest.fixture(scope="module")
def clips():
    pytest.importorskip("av", reason="PyAV is not installed")
    from clip_oracle import encode

    vp9 = dict(codec="libvpx-vp9")
    return {
        "small": encode(count=30, **vp9, container="webm"),
        "other": encode(count=40, height=96, width=80, rate=30, **vp9),
        "709": encode(count=4, height=720, width=96, **vp9),
        "h264": encode(count=5),
    }


@pytest.mark.parametrize(
    ("win", "lose", "options"),
    [
        ("small", "small", dict(frames=9, size=(48, 64), hflip=1.0)),
        ("small", "other", dict(frames=9, size=(40, 56), fps=12, start="random", crop="random", hflip=0.5)),
        ("small", "other", dict(frames=40, size=32, fps=24, short="loop", resize="contain")),
        ("other", "small", dict(frames=3, size=32, layout="TCHW", interpolation="bicubic")),
        ("709", "709", dict(frames=2, size=(720, 96))),
    ],
    ids=str,
)
def test_frames_are_those_of_cpp(decoder, clips, monkeypatch, win, lose, options):
    """Through DALI's VP9 decoder on the CPU. Its 8-bit RGB is rounded, and clipped before it is resized: 24 levels
    at edges of saturated colours, 37 beyond BT.601's; on average a quarter of a level, and of BT.709 less than 2.
    The next frame is 3 levels away on average, another mirror or crop more."""
    asked = []
    for way in ("decode_clips", "decode_timed"):
        plain = getattr(dali_clips, way)
        monkeypatch.setattr(dali_clips, way, lambda *a, f=plain, **o: asked.append(o["frames"]) or f(*a, **o))
    arms = [clips[win]], [clips[lose]]
    a = decode_clips(*arms, seeds=[3], **LEVELS, **options)
    b = decoder.decode_clips(*arms, seeds=[3], **LEVELS, **options)
    assert_same_facts(a, b, "times", "concealed")
    assert (a.matrix, a.full_range) == (b.matrix, b.full_range)
    apart = (a.pixels - b.pixels).abs()
    assert apart.mean() < (2 if win == "709" else 0.4)
    assert apart.max() < 40
    assert asked == [1, 1]  # the canary alone, at the first frame and the last


def test_paths_and_failures(decoder, clips, tmp_path):
    path = tmp_path / "clip.webm"
    path.write_bytes(clips["small"])
    win, lose = [path, clips["small"], b"no clip"], [clips["other"], path, path]
    a = decode_clips(win, lose, frames=3, size=32, on_error="mask")
    b = decoder.decode_clips(win, lose, frames=3, size=32, on_error="mask")
    assert_same_facts(a, b, "times")
    assert b.ok.tolist() == [True, True, False]
    with pytest.raises(DecodeError, match=r"win\[0\].* it ends after"):
        decoder.decode_clips([path], [path], frames=31, size=32)


def muxed(*clips, sizes, default=0):
    """Streams of VP9 in one WebM, under headers that tell those sizes."""
    import av
    from av.stream import Disposition

    file = io.BytesIO()
    with av.open(file, "w", format="webm") as output:
        streams, packets = [], []
        for number, (clip, (height, width)) in enumerate(zip(clips, sizes, strict=True)):
            stream = output.add_stream("libvpx-vp9", rate=24)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.disposition = Disposition.default if number == default else Disposition(0)
            streams.append(stream)
            with av.open(io.BytesIO(clip)) as opened:
                packets += [(p.pts * p.time_base, number, p.pts, p.time_base, p.is_keyframe, bytes(p))
                            for p in opened.demux(video=0) if p.size]  # fmt: skip
        for _, number, pts, unit, is_keyframe, data in sorted(packets, key=lambda p: p[:2]):
            packet = av.Packet(data)
            packet.stream, packet.time_base, packet.is_keyframe = streams[number], unit, is_keyframe
            packet.pts = packet.dts = pts
            output.mux(packet)
    return file.getvalue()


@pytest.mark.parametrize("form", ["two streams", "header"])
def test_clips_of_which_dali_would_show_something_else_are_for_cpp(decoder, clips, form):
    from clip_oracle import encode

    plain = {"auto-alt-ref": "0", "lag-in-frames": "0"}
    one = encode(count=16, codec="libvpx-vp9", container="webm", **plain)
    other = encode(count=16, height=96, width=80, codec="libvpx-vp9", container="webm", **plain)
    if form == "header":
        clip = muxed(one, sizes=[(96, 128)])
    else:
        clip = muxed(one, other, sizes=[(48, 64), (96, 80)], default=1)
    options = dict(frames=3, size=(40, 40), **LEVELS)
    a = decode_clips([clip], [one], **options)
    b = decoder.decode_clips([clip], [one], **options)
    assert_same_facts(a, b, "times")
    assert torch.equal(a.pixels, b.pixels)


def test_without_pyav_the_extra_is_named(decoder, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"needs PyAV: pip install 'polydpo-fast\[video\]'"):
        decoder.decode_clips([b""], [b""], frames=2, size=32)


def test_clips_have_their_time(decoder, clips):
    from polydpo_fast import ClipLimits

    late = ClipLimits(timeout_s=1e-9)
    got = decoder.decode_clips([clips["small"]], [clips["small"]], frames=2, size=32, limits=late, on_error="mask")
    assert "limits.timeout_s" in got.errors[0].reason


@needs_dali
@pytest.mark.parametrize("at", [0, -1])
def test_the_canary_sees_a_wrong_frame_at_either_end(clips, monkeypatch, at):
    decoder, frames = DaliDecoder("cpu", 1), dali_clips._frames

    def tampered(*arguments):
        levels = [frame.clone() for frame in frames(*arguments)]
        levels[at] = levels[at].flip(1)
        return levels

    monkeypatch.setattr(dali_clips, "_frames", tampered)
    with pytest.raises(CanaryError, match=r"win\[0\] is decoded by DALI into other pixels"):
        decoder.decode_clips([clips["small"]], [clips["small"]], frames=9, size=(48, 64))


@pytest.mark.parametrize("start", [1 / 30, "center"])
@pytest.mark.parametrize(("win", "lose"), [("webm", "mp4"), ("mp4", "webm")])
def test_the_canary_looks_at_the_same_frames_whatever_the_clocks(monkeypatch, win, lose, start):
    """Of milliseconds, and of a fifteen-thousandth second. DALI is stood in for by FFmpeg's frames, which are right."""
    pytest.importorskip("av", reason="PyAV is not installed")
    from clip_oracle import encode, full_decode, rgb

    def true_frames(engine, side, shown):
        frames = [frame for _, frame in full_decode(side.data)]
        return torch.stack([torch.from_numpy(rgb(frames[k]).round()).movedim(0, -1).byte() for k in shown])

    monkeypatch.setattr(dali_clips, "_frames", true_frames)
    # Frames that are told apart: the next is 30 levels away.
    monkeypatch.setattr("clip_oracle.scene", lambda k, h, w: torch.full((h, w, 3), 20 + 30 * (k % 7)).byte().numpy())
    made = {name: encode(9, codec="libvpx-vp9", container=name, rate=30) for name in (win, lose)}
    options = dict(frames=2, size=(48, 64), start=start, dtype=torch.uint8)
    engine = Engine(torch.device("cpu"), 1, 1, 0.65)
    got = dali_clips.decode(engine, [made[win]], [made[lose]], options)
    want = decode_clips([made[win]], [made[lose]], **options)
    assert torch.equal(got.times, want.times)
    assert (got.pixels.int() - want.pixels).abs().max() <= 1


def test_frames_that_are_asked_for_twice_are_decoded_once(decoder, clips, monkeypatch):
    """For each of them DALI begins again."""
    asked, run = [], decoder._engine.run
    monkeypatch.setattr(decoder._engine, "run", lambda *a: asked.append(a[3]["frames"][0].tolist()) or run(*a))
    options = dict(frames=24, size=(48, 64), fps=48, start=0.4, short="repeat", dtype=torch.uint8)
    a = decode_clips([clips["small"]], [clips["small"]], **options)
    b = decoder.decode_clips([clips["small"]], [clips["small"]], **options)
    assert asked == [[*range(9, 22)]] * 2
    assert torch.equal(a.times, b.times)
    # The frame beside it is three levels away.
    assert (a.pixels.float() - b.pixels.float()).abs().mean(dim=(0, 1, 3, 4)).max() < 0.8


def side_of(clip, is_gpu, strict=True):
    from polydpo_fast import ClipLimits
    from polydpo_fast.video import Clip

    return dali_sides._open_clip(clip, Clip(clip, ClipLimits(), strict, 1, None), is_gpu)


def test_frames_that_dali_does_not_find_are_not_black(decoder, clips, monkeypatch):
    side = side_of(clips["small"], False)
    with pytest.raises(RuntimeError, match="frame index 30"):
        dali_clips._frames(decoder._engine, side, torch.tensor([0, 30]).numpy())
    monkeypatch.setattr(dali_clips, "_MOST_BYTES", 3 * 48 * 64)
    with pytest.raises(ValueError, match="memory"):
        dali_clips._frames(decoder._engine, side, torch.tensor([0, 1]).numpy())


def test_a_clip_that_is_cut_off_is_told(decoder, clips):
    """Without strict=True it is decoded, by C++, which counts what is concealed."""
    cut = clips["small"][: len(clips["small"]) * 3 // 4]
    options = dict(frames=3, size=32, start=0.0, strict=False)
    a, b = decode_clips([cut], [cut], **options), decoder.decode_clips([cut], [cut], **options)
    for found in (a, b):
        assert torch.equal(found.concealed, torch.tensor([1, 1]))  # numbers, not flags
    assert torch.equal(a.pixels, b.pixels)


def with_size(clip, height, width):
    """The header of an MP4 tells another size than the stream."""
    at = clip.index(b"stsd") + 12 + 32
    return clip[:at] + struct.pack(">HH", width, height) + clip[at + 4 :]


def test_what_nvdec_is_given():
    """What NVDEC decodes of VP9, AV1 and fields DALI would count wrongly; other sizes it would take for those told."""
    pytest.importorskip("av", reason="PyAV is not installed")
    from clip_oracle import encode, joined

    repeated = {"x264-params": "repeat-headers=1", "bf": "0"}
    changing = [encode(4, width=width, container="matroska", **repeated) for width in (64, 80)]
    late = [(1 << 31) * 600 // 1000 + 1 - 25 * k for k in (3, 2, 1)]  # milliseconds of 32 bits end after the last
    for number, (clip, is_plain) in enumerate(
        (
            (encode(count=4), True),
            (encode(count=4, codec="libx265"), True),
            (encode(count=4, **repeated), True),
            (encode(count=4, codec="libvpx-vp9"), False),
            (encode(count=4, **{"x264-params": "tff=1"}), False),
            (encode(count=4, **{"x264-params": "fake-interlaced=1"}), False),
            (joined(*changing, container="matroska"), False),
            (joined(changing[0], changing[0], container="matroska"), True),
            (encode(3, ticks=late, container="matroska"), True),
            (encode(4, ticks=[*late, late[-1] + 25], container="matroska"), False),
            *((with_size(encode(4, codec=codec), 48, 64), True) for codec in ("libx264", "libx265")),
            *((with_size(encode(4, codec=codec), 96, 128), False) for codec in ("libx264", "libx265")),
        )
    ):
        assert side_of(clip, True).is_plain == is_plain, number


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_nvdec_is_given_no_size_for_which_dali_has_the_decoder_of_another(monkeypatch, codec):
    """It looks for decoders by the coded size, and keeps them by the one that is shown."""
    pytest.importorskip("av", reason="PyAV is not installed")
    from clip_oracle import encode

    monkeypatch.setattr(dali_sides, "_whole", set())
    whole, less, other = (encode(4, height=height, codec=codec) for height in (48, 42, 58))
    assert [side_of(clip, True).is_plain for clip in (less, whole, less, whole, other)] == [
        True,
        True,
        False,
        True,
        True,
    ]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_colours_are_exact_within_autocast(dtype):
    levels = (255 * torch.rand(5, 7, 3, generator=torch.Generator().manual_seed(0))).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        found = dali_clips._recoloured(levels)
    exact = levels.double() @ torch.from_numpy(dali_clips._TO_709).T
    assert found.dtype == torch.float32
    assert (found - exact).abs().max() < 1e-4  # float32 of some hundred levels, three products


def test_h264_needs_a_gpu(decoder, clips):
    with pytest.raises(ValueError, match=r"codec is h264, and DALI's CPU build decodes VP8 and VP9 only; .*'cpp'"):
        decoder.decode_clips([clips["small"]], [clips["h264"]], frames=3, size=32)


@pytest.mark.parametrize("colour", [(0, 255, 0), (255, 0, 0), (0, 0, 255), (255, 0, 255), (90, 120, 60)])
def test_the_canary_lets_colours_pass_that_bt601_has_not(decoder, clips, monkeypatch, colour):
    from clip_oracle import encode

    monkeypatch.setattr("clip_oracle.scene", lambda _, h, w: torch.tensor(colour).expand(h, w, 3).byte().numpy())
    clip = encode(count=2, height=720, width=64, codec="libvpx-vp9", colorspace="bt709")
    assert decoder.decode_clips([clip], [clip], frames=1, size=(720, 64)).ok.all()


# ----------------------------------------------------------------------------------------------- on a GPU


def test_one_pipeline_takes_batches_of_any_size(decoder, monkeypatch):
    """The largest that was needed; its pixels are those of one for a single pair."""
    built = []
    build = Engine._pipeline
    monkeypatch.setattr(Engine, "_pipeline", lambda self, graph, most: built.append(most) or build(self, graph, most))
    monkeypatch.setattr(decoder._engine, "_pipelines", {})
    images = [jpeg(picture(61 + i, 83, seed=i)) for i in range(5)]
    singles = [decode_pairs([image], [image], size=32).pixels for image in images]
    for pairs in (3, 1, 2, 3, 5, 4):
        found = decoder.decode_pairs(images[:pairs], images[:pairs], size=32).pixels
        alone = torch.cat([one[:1] for one in singles[:pairs]])
        assert (found[:pairs].float() - alone.float()).abs().mean() < 0.004  # half a level
    assert built == [8, 16]


@needs_dali
@pytest.mark.parametrize("way", [dali_images, dali_clips])
def test_the_gpu_pipelines_are_sound(way):
    """Every operator and argument is known to DALI, on a GPU; whether it runs there is for the tests below."""
    from nvidia.dali import Pipeline

    engine = Engine(torch.device("cuda", 0), 1, None, 0.65)
    pipeline = Pipeline(batch_size=2, num_threads=1, device_id=None, prefetch_queue_depth=1)
    with pipeline:
        pipeline.set_outputs(way._graph(engine))
    written = pipeline.serialize()
    assert b"mixed" in written
    assert b"affine" in written


@needs_dali
def test_a_pipeline_on_a_gpu_has_no_more_threads_than_samples():
    engine = Engine(torch.device("cuda", 0), 64, None, 0.65)
    for most, threads in ((4, 4), (128, 64)):
        assert engine._pipeline(lambda: dali_images._graph(engine), most).num_threads == threads


@pytest.mark.gpu
@needs_dali
@pytest.mark.parametrize("resize", [None, "cover", "contain"])
def test_images_on_a_gpu(resize):
    """nvJPEG's transform is not libjpeg's: the canary's bound for tiles is all that is promised."""
    decoder = DaliDecoder("cuda", canary=1)
    images = [oriented(o, (261, 283), subsampling=o % 3) for o in range(1, 9)]
    options = dict(size=(160, 192), resize=resize, crop="random", hflip=0.5, seeds=range(8))
    a, b = decode_pairs(images, images[::-1], **options), decoder.decode_pairs(images, images[::-1], **options)
    assert_same_facts(a, b)
    assert b.pixels.device == decoder.device
    assert (a.pixels.float() - b.pixels.cpu().float()).abs().mean() < 0.02


@pytest.mark.gpu
@needs_dali
def test_clips_on_a_gpu():
    pytest.importorskip("av", reason="PyAV is not installed")
    from clip_oracle import encode

    clip, options = encode(count=30, height=144, width=176), dict(frames=9, size=(128, 160))
    a, b = (
        decode_clips([clip], [clip], **options),
        DaliDecoder("cuda", canary=1).decode_clips([clip], [clip], **options),
    )
    assert_same_facts(a, b, "times")
    assert (a.pixels.float() - b.pixels.cpu().float()).abs().mean() < 0.02
