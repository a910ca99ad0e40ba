"""Our decoder of JPEGs against libjpeg, whose pixels and errors are to be the same."""

import ctypes
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile, features

import polydpo_fast
from polydpo_fast import _C

EITHER, LIBJPEG, OWN = "either", "libjpeg", "own"


def pair_of(data, decoder, **options):
    """One image, twice, with that decoder."""
    with pytest.MonkeyPatch.context() as patch:
        plain = _C.decode_pairs
        patch.setattr(_C, "decode_pairs", lambda *images, **given: plain(*images, **given, jpeg=decoder))
        return polydpo_fast.decode_pairs(
            [data], [data], **{"resize": None, "dtype": torch.uint8, "on_error": "mask", "threads": 1, **options}
        )


def decoded(data, decoder, **options):
    """Its pixels and errors."""
    pair = pair_of(data, decoder, **options)
    return pair.pixels, [error.reason for error in pair.errors]


LEFT = ["only libjpeg can decode it"] * 2


def check(data, *, left=False, **options):
    """Ours gives libjpeg's pixels; or, where an image is left to libjpeg, says so."""
    expected, failed = decoded(data, LIBJPEG, **options)
    assert not failed
    ours, failed = decoded(data, OWN, **options)
    assert failed == (LEFT if left else [])
    assert left or torch.equal(ours, expected)
    ours, failed = decoded(data, EITHER, **options)
    assert not failed
    assert torch.equal(ours, expected)


def picture(kind, height, width):
    rng = np.random.default_rng(7)
    y, x = np.mgrid[:height, :width]
    if kind == "noise":  # many and large coefficients
        pixels = rng.integers(0, 256, (height, width, 3))
    elif kind == "photograph":
        pixels = np.stack([128 + 100 * np.sin(x / 7 + y / 9), 128 + 90 * np.cos(x / 5), 255 * y / height], -1)
        pixels = pixels + rng.normal(0, 6, pixels.shape)
    elif kind == "mosaic":  # whole blocks of one colour each
        tiles = rng.integers(0, 256, (height // 16 + 1, width // 16 + 1, 3))
        pixels = tiles.repeat(16, axis=0).repeat(16, axis=1)[:height, :width]
    else:  # whole blocks without a coefficient
        pixels = np.full((height, width, 3), (200, 30, 90))
        pixels[height // 3 :, width // 2 :] = (10, 200, 50)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def jpeg(image, **options):
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("kind", ["noise", "photograph", "flat", "mosaic"])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("shape", [(1, 1), (5, 5), (8, 8), (33, 70), (121, 57)])
def test_its_pixels_are_those_of_libjpeg(progressive, kind, mode, shape):
    image = picture(kind, *shape).convert(mode)
    for quality, subsampling in [(20, 2), (75, 1), (92, 2), (100, 0)]:
        for options in ({}, {"optimize": True}, {"restart_marker_blocks": 3}):
            data = jpeg(image, quality=quality, subsampling=subsampling, progressive=progressive, **options)
            narrow = mode == "RGB" and subsampling > 0 and shape[1] <= 4
            check(data, left=mode == "CMYK" or narrow, size=shape)


@pytest.mark.parametrize("kind", ["noise", "photograph"])
@pytest.mark.parametrize("progressive", [False, True])
def test_rgb_is_stored_as_it_is(kind, progressive):
    data = jpeg(picture(kind, 45, 62), quality=90, keep_rgb=True, progressive=progressive)
    check(data, size=(45, 62))
    check(data, size=(20, 31), crop="random", seeds=[3])


@pytest.mark.parametrize("progressive", [False, True])
def test_long_scans_pass_through_its_window(progressive, monkeypatch):
    """Noise at full quality is hundreds of kilobytes: the window of a scan moves many times."""
    monkeypatch.setattr(ImageFile, "MAXBLOCK", 1 << 20)  # of Pillow's encoder, which does without suspension
    data = jpeg(picture("noise", 400, 496), quality=100, subsampling=0, progressive=progressive)
    assert len(data) > 20 * 16384
    check(data, size=(400, 496))


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("dtype", [torch.uint8, "yuv420"])
def test_crops_and_planes(progressive, dtype):
    data = jpeg(picture("photograph", 200, 304), quality=90, subsampling=2, progressive=progressive)
    for seed in range(8):
        check(data, size=(64, 96), crop="random", seeds=[seed], dtype=dtype)


def test_the_longest_runs_two_at_a_time():
    """Further bits where only each sixteenth coefficient is known in the end: a run of 15 has a code of one bit."""
    zigzag = sorted(range(64), key=lambda i: (i // 8 + i % 8, i // 8 if (i // 8 + i % 8) % 2 else i % 8))
    random, x, steps = np.random.default_rng(0), np.arange(8), [255] * 64
    waves = np.cos((2 * x[:, None] + 1) * x * np.pi / 16) * np.where(x == 0, np.sqrt(1 / 8), 1 / 2)
    pixels = np.full((8, 8, 8, 8), 128.0)  # blocks down, rows, blocks across, columns
    for position in zigzag[16::16]:
        steps[position] = 16
        signs = random.choice([-16, 16], (8, 1, 8, 1))
        pixels += signs * waves[:, position // 8, None, None] * waves[:, position % 8]
    image = Image.fromarray(pixels.reshape(64, 64).round().astype(np.uint8))
    data = jpeg(image, qtables=[steps], progressive=True)
    assert bytes.fromhex("0101 0000000000000000000000000000 f1 00".replace(" ", "")) in data  # codes of 1 and 2 bits
    check(data, size=(64, 64))


DAMAGED = [
    jpeg(picture("photograph", 48, 56), quality=quality, subsampling=2, progressive=progressive, **options)
    for progressive in (False, True)
    for quality, options in ((50, {}), (95, {"restart_marker_blocks": 2}), (85, {"optimize": True}))
]


@given(data=st.data())
def test_damage_is_what_libjpeg_makes_of_it(data):
    damaged = bytearray(data.draw(st.sampled_from(DAMAGED)))
    scans = damaged.index(b"\xff\xda")
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(scans, len(damaged) - 1))
        change = data.draw(st.sampled_from(["byte", "bit", "cut", "insert", "end"]))
        if change == "byte":
            damaged[at] = data.draw(st.sampled_from([0, 0xD0, 0xD9, 0xFF, 0x5A]))
        elif change == "bit":
            damaged[at] ^= 1 << data.draw(st.integers(0, 7))
        elif change == "cut":
            del damaged[at : at + data.draw(st.integers(1, 5))]
        elif change == "insert":
            damaged[at:at] = data.draw(st.binary(min_size=1, max_size=3))
        else:
            del damaged[max(at, scans + 1) :]
        if len(damaged) <= scans:
            break
    strict = data.draw(st.booleans())
    libjpegs = pair_of(bytes(damaged), LIBJPEG, size=(48, 56), strict=strict)
    for decoder in (EITHER, OWN):
        ours = pair_of(bytes(damaged), decoder, size=(48, 56), strict=strict)
        if decoder == OWN and [error.reason for error in ours.errors] == LEFT:
            continue
        assert ours.errors == libjpegs.errors
        assert ours.damaged == libjpegs.damaged
        assert torch.equal(ours.pixels, libjpegs.pixels)


@pytest.mark.parametrize("decoder", [EITHER, LIBJPEG])
@pytest.mark.parametrize("subsampling", [0, 2, "grey"])
def test_a_code_that_does_not_exist_is_an_error_wherever_it_is(decoder, subsampling):
    """No code is of ones alone (ITU-T T.81, annex C), so 48 of them hold one that is none. libjpeg-turbo's quick way
    takes it for a zero without a word, and often finds back into step."""
    image = picture("photograph", 128, 128)
    data = jpeg(image.convert("L")) if subsampling == "grey" else jpeg(image, subsampling=subsampling)
    begin = data.index(b"\xff\xda") + 14
    for at in np.linspace(begin + 20, len(data) - 20, 30).astype(int):
        if data[at - 1] == 0xFF:
            continue
        spoilt = data[:at] + b"\xff\0" * 6 + data[at + 6 :]
        assert len(decoded(spoilt, decoder, size=128)[1]) == 2
        mended = polydpo_fast.decode_pairs([spoilt], [spoilt], size=128, strict=False)
        assert len(mended.damaged) == 2


DECODE = """
import sys
from types import SimpleNamespace as Facts
import numpy as np
sys.path.insert(0, sys.argv[1])  # without the package, and so without PyTorch, which takes seconds
import _C
data, out = sys.stdin.buffer.read(), np.zeros((2, 3, 12, 23), np.uint8)
form = Facts(size=(12, 23), resize=None, interpolation="bilinear", dtype="uint8", planes=False, offset=(0, 0, 0),
             scale=(1, 1, 1), background=(0, 0, 0))
limits = Facts(pixels=1000, bytes=10000, decoded=10000, chunk=10000, scans=10)
draw = Facts(centre=True, top=0, left=0, flipped=False)
_, failed, _ = _C.decode_pairs([data], [data], raw=[], draws=[draw], out=out.ctypes.data, output=form,
                               apply_orientation=True, strict=True, limits=limits, threads=1)
sys.exit(str(failed)) if failed else sys.stdout.buffer.write(out[1].tobytes())
"""


def lossless_jpeg(pixels):
    """ITU-T T.81, annex H: each value's difference to the one on its left, or above. RGB, as Adobe's marker says."""
    height, width, _ = pixels.shape
    codes = bytes([0, 0, 0, 9, *[0] * 12, *range(9)])  # 4 bits each, for the lengths of differences
    parts = [
        (0xEE, b"Adobe" + bytes(7)),
        (0xC3, bytes([8, 0, height, 0, width, 3, 0, 0x11, 0, 1, 0x11, 0, 2, 0x11, 0])),
        (0xC4, b"\0" + codes),
        (0xDA, bytes([3, 0, 0, 1, 0, 2, 0, 1, 0, 0])),
    ]
    values = pixels.astype(int)
    differences = np.diff(values, axis=1, prepend=values[:, :1])
    differences[:, 0] = np.diff(values[:, 0], axis=0, prepend=128)
    bits = ""
    for difference in differences.ravel().tolist():
        length = abs(difference).bit_length()
        bits += f"{length:04b}" + (f"{difference % (1 << length) - (difference < 0):0{length}b}" if length else "")
    bits += "1" * (-len(bits) % 8)
    scan = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")
    head = b"".join(bytes([0xFF, kind, 0, len(part) + 2]) + part for kind, part in parts)
    return b"\xff\xd8" + head + scan + b"\xff\xd9"


def test_lossless_jpegs_are_decoded_where_libjpeg_can():
    """libjpeg-turbo 3 can, such as Pillow's, which stands in for the system's here."""
    turbo = [*Path(Image.__file__).parents[1].glob("pillow.libs/libjpeg-*.so.62*")]
    if not turbo or int((features.version("libjpeg_turbo") or "0").split(".")[0]) < 3:
        pytest.skip("Pillow has no libjpeg-turbo 3 of its own")
    pixels = np.random.default_rng(0).integers(96, 160, (12, 23, 3)).astype(np.uint8)
    ran = subprocess.run(
        [sys.executable, "-c", DECODE, Path(_C.__file__).parent],
        input=lossless_jpeg(pixels),
        capture_output=True,
        env={**os.environ, "LD_PRELOAD": f"{os.environ.get('LD_PRELOAD', '')}:{turbo[0]}"},
    )
    assert ran.returncode == 0, ran.stderr.decode()
    assert np.array_equal(np.frombuffer(ran.stdout, np.uint8), pixels.transpose(2, 0, 1).ravel())


def test_what_is_not_as_it_should_be_is_left_to_libjpeg():
    cut = DAMAGED[0][:-20]
    assert decoded(cut, OWN, size=(48, 56), strict=False)[1] == LEFT
    assert decoded(cut, EITHER, size=(48, 56), strict=False)[1] == []


def test_a_coefficient_whose_sign_would_change_is_left_to_libjpeg():
    """-32768 of a first scan, which two further bits make 32767 in libjpeg's words: no mask of signs tells that."""

    def segment(marker, body):
        return bytes([0xFF, marker]) + (len(body) + 2).to_bytes(2, "big") + body

    def scan(first, last, high, low, bits):
        bits += "1" * (-len(bits) % 8)
        data = bytes(int(bits[at : at + 8], 2) for at in range(0, len(bits), 8)).replace(b"\xff", b"\xff\0")
        return segment(0xDA, bytes([1, 1, 0, first, last, high << 4 | low])) + data

    def image(value):
        """The first AC coefficient is 4 * value, which is negative, before the further bits."""
        size, whole, end = (-value).bit_length(), "00", "01"
        return b"".join(
            (
                b"\xff\xd8",
                segment(0xDB, bytes([0]) + bytes([1]) * 64),
                segment(0xC2, bytes([8, 0, 8, 0, 8, 1, 1, 0x11, 0])),
                segment(0xC4, bytes([0x00, 1]) + bytes(15) + bytes([0])),
                segment(0xC4, bytes([0x10, 0, 2]) + bytes(14) + bytes([size, 0x00])),
                scan(0, 0, 0, 0, "0"),
                scan(1, 63, 0, 2, whole + f"{value + 2**size - 1:0{size}b}" + end),
                scan(1, 63, 2, 1, end + "1"),
                scan(1, 63, 1, 0, end + "1"),
                b"\xff\xd9",
            )
        )

    for value, left in ((-8191, False), (-8192, True)):
        data = image(value)
        expected, failed = decoded(data, LIBJPEG, size=(8, 8))
        assert not failed
        assert torch.equal(decoded(data, EITHER, size=(8, 8))[0], expected)
        ours, failed = decoded(data, OWN, size=(8, 8))
        assert failed == (LEFT if left else [])
        assert left or torch.equal(ours, expected)


def test_what_it_remembers_of_a_progressive_image_is_limited():
    """128 bytes of coefficients and 32 of ours for each block; if those are too much, libjpeg does without."""
    data = jpeg(picture("noise", 64, 64), quality=50, subsampling=0, progressive=True)
    blocks = 3 * 64
    for decoder, bytes_of_block in ((OWN, 160), (LIBJPEG, 128), (EITHER, 128)):
        for room, expected in ((0, 0), (-1, 2)):
            limits = polydpo_fast.DecodeLimits(decoded=bytes_of_block * blocks + room)
            assert len(decoded(data, decoder, size=(64, 64), limits=limits)[1]) == expected


@pytest.mark.parametrize("strict", [True, False])
def test_what_stands_between_scans_is_judged_by_libjpeg(strict):
    """A second JFIF header, which libjpeg warns of; a comment, which nobody minds."""
    data = jpeg(picture("photograph", 48, 56), progressive=True)
    second = data.index(b"\xff\xda", data.index(b"\xff\xda") + 1)
    tables = data.rindex(b"\xff\xc4", 0, second)
    for marker, error in ((b"\xff\xe0\x00\x10JFIF\0\2\1\0\0\1\0\1\0\0", True), (b"\xff\xfe\x00\x05new", False)):
        changed = data[:tables] + marker + data[tables:]
        expected = decoded(changed, LIBJPEG, size=(48, 56), strict=strict)
        assert bool(expected[1]) == (error and strict)
        for decoder in (EITHER, OWN):
            ours = decoded(changed, decoder, size=(48, 56), strict=strict)
            if decoder == OWN and error:
                assert ours[1] == LEFT
            else:
                assert ours[1] == expected[1]
                assert torch.equal(ours[0], expected[0])


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (2, 1, 0)])
def test_components_out_of_order_are_judged_by_libjpeg(order):
    """In the second scan of first coefficients, as libjpeg takes only some orders."""
    data = jpeg(picture("photograph", 88, 96), quality=60, progressive=True)
    at = -1
    while True:  # the scan of all components' last bit
        at = data.index(b"\xff\xda\x00\x0c\x03", at + 1)
        if data[at + 11 : at + 14] == b"\0\0\x10":
            break
    entries = [data[at + 5 + 2 * i : at + 7 + 2 * i] for i in order]
    changed = data[: at + 5] + b"".join(entries) + data[at + 11 :]
    expected = decoded(changed, LIBJPEG, size=(88, 96), strict=False)
    ours = decoded(changed, EITHER, size=(88, 96), strict=False)
    assert ours[1] == expected[1]
    assert torch.equal(ours[0], expected[0])
    assert decoded(changed, OWN, size=(88, 96))[1] == ([] if order == (0, 1, 2) else LEFT)


# ------------------------------------------------------------------------------------------ what Pillow does not write


@pytest.fixture(scope="session")
def encode(tmp_path_factory):
    """A function of image, sampling and scans; see jpeg_scans.c."""
    if shutil.which("gcc") is None or shutil.which("pkg-config") is None:
        pytest.skip("gcc and pkg-config, which build the encoder, are not installed")
    library = tmp_path_factory.mktemp("jpeg") / "jpeg_scans.so"
    source = Path(__file__).with_name("jpeg_scans.c")
    flags = subprocess.run(["pkg-config", "--cflags", "--libs", "libjpeg"], capture_output=True, text=True, check=True)
    subprocess.run(["gcc", "-O2", "-shared", "-fPIC", source, "-o", library, *flags.stdout.split()], check=True)
    native = ctypes.CDLL(str(library)).encode
    native.restype = ctypes.c_ulong

    def encode(image, sampling, scans=(), quality=90, interval=0):
        numbers = [number for scan in scans for number in scan]
        room = ctypes.create_string_buffer(1 << 20)
        size = native(
            image.tobytes(), *image.size, (ctypes.c_int * 6)(*sampling), (ctypes.c_int * len(numbers))(*numbers),
            len(scans), quality, interval, room, ctypes.c_ulong(len(room)),
        )  # fmt: skip
        assert size > 0
        return room.raw[:size]

    return encode


def dc(components, high, low):
    return (len(components), *components, *[0] * (3 - len(components)), 0, 0, high, low)


def ac(component, start, end, high, low):
    return (1, component, 0, 0, start, end, high, low)


SCANS = {
    "one": (),
    "each component's first alone": [dc([c], 0, 0) for c in range(3)] + [ac(c, 1, 63, 0, 0) for c in range(3)],
    "upper coefficients first": [dc([0, 1, 2], 0, 1), *(ac(c, 6, 63, 0, 0) for c in range(3))]
    + [ac(c, 1, 5, 0, 0) for c in range(3)]
    + [dc([0, 1, 2], 1, 0)],
    "a bit at a time": [dc([0, 1, 2], 0, 3), *(ac(c, 1, 63, 0, 3) for c in range(3))]
    + [dc([0, 1, 2], b + 1, b) for b in (2, 1, 0)]
    + [ac(c, 1, 63, b + 1, b) for b in (2, 1, 0) for c in (2, 0, 1)],
    "a bit of some at a time": [
        dc([0, 1, 2], 0, 0),
        *(ac(c, *band, 0, 2) for c in range(3) for band in ((1, 2), (3, 63))),
    ]
    + [ac(c, *band, b + 1, b) for b in (1, 0) for c in range(3) for band in ((1, 10), (11, 63))],
}
UNFINISHED = {
    "first coefficients only": [dc([0, 1, 2], 0, 2)],
    "not the last bit": [dc([0, 1, 2], 0, 0), *(ac(c, 1, 63, 0, 1) for c in range(3))],
}
SAMPLINGS = {
    "4:4:4": (1, 1, 1, 1, 1, 1),
    "4:2:2": (2, 1, 1, 1, 1, 1),
    "4:2:0": (2, 2, 1, 1, 1, 1),
}
ODD_SAMPLINGS = {
    "4:1:1": (4, 1, 1, 1, 1, 1),
    "4:4:0": (1, 2, 1, 1, 1, 1),
    "one chroma finer": (2, 1, 1, 4, 1, 2),
    "a third": (2, 3, 1, 1, 1, 1),
}


@pytest.mark.parametrize("scans", SCANS)
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("kind", ["noise", "photograph"])
def test_any_order_of_scans(encode, scans, sampling, kind):
    image = picture(kind, 83, 101)
    for quality, interval in ((100, 0), (60, 0), (90, 5)):
        data = encode(image, SAMPLINGS[sampling], SCANS[scans], quality, interval)
        check(data, size=(83, 101))
        check(data, size=(40, 33), crop="random", seeds=[5])


@pytest.mark.parametrize("scans", UNFINISHED)
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_unfinished_images_are_smoothed_by_libjpeg(encode, scans, sampling):
    data = encode(picture("noise", 83, 101), SAMPLINGS[sampling], UNFINISHED[scans])
    check(data, left=True, size=(83, 101))
    check(data, left=True, size=(40, 33), crop="random", seeds=[5])
    whole = decoded(data, LIBJPEG, size=(83, 101))[0]
    for seed in range(12):  # smoothing looks beyond a crop
        options = {"size": (20, 17), "resize": None, "crop": "random", "seeds": [seed]}
        top, left = polydpo_fast.decode_pairs([data], [data], **options).crop_top_left[0].tolist()
        assert torch.equal(decoded(data, LIBJPEG, **options)[0], whole[..., top : top + 20, left : left + 17])


@pytest.mark.parametrize("sampling", {**SAMPLINGS, **ODD_SAMPLINGS})
@pytest.mark.parametrize("scans", ["one", "a bit at a time"])
def test_a_crop_is_the_crop_of_the_whole(encode, sampling, scans):
    """Where the sampling is odd, libjpeg-turbo 2.1.5 gives wrong rows after skipping some, or does not come back."""
    data = encode(picture("noise", 119, 67), {**SAMPLINGS, **ODD_SAMPLINGS}[sampling], SCANS[scans])
    whole = torch.from_numpy(np.array(Image.open(io.BytesIO(data)))).permute(2, 0, 1)
    for height, width in ((1, 67), (37, 67), (80, 20), (119, 9), (3, 1)):
        for seed in range(12):
            options = {"size": (height, width), "resize": None, "crop": "random", "seeds": [seed]}
            top, left = polydpo_fast.decode_pairs([data], [data], **options).crop_top_left[0].tolist()
            for decoder in (EITHER, LIBJPEG):
                pixels, failed = decoded(data, decoder, **options)
                assert not failed
                assert torch.equal(pixels[0], whole[:, top : top + height, left : left + width])
    check(data, left=sampling in ODD_SAMPLINGS, size=(119, 67))
