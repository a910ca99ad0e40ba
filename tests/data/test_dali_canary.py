"""The canary of `DaliDecoder`: pixels that are wrong are seen, and others are not."""

import io
import itertools

import pytest
import torch
from image_oracle import jpeg, picture, png
from PIL import Image

pytest.importorskip("polydpo_fast._C", reason="the C++ extension is not built")
from data.dali_cases import needs_dali

from polydpo_fast import DecodeError, decode_clips, decode_pairs
from polydpo_fast.data.dali import clips as dali_clips
from polydpo_fast.data.dali import images as dali_images
from polydpo_fast.data.dali.decoder import CanaryError, DaliDecoder
from polydpo_fast.data.dali.engine import Engine


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


@pytest.mark.parametrize("colour", [(0, 255, 0), (255, 0, 0), (0, 0, 255), (255, 0, 255), (90, 120, 60)])
def test_the_canary_lets_colours_pass_that_bt601_has_not(decoder, clips, monkeypatch, colour):
    from clip_oracle import encode

    monkeypatch.setattr("clip_oracle.scene", lambda _, h, w: torch.tensor(colour).expand(h, w, 3).byte().numpy())
    clip = encode(count=2, height=720, width=64, codec="libvpx-vp9", colorspace="bt709")
    assert decoder.decode_clips([clip], [clip], frames=1, size=(720, 64)).ok.all()
