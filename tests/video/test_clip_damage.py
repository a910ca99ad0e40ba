"""`decode_clips` and bytes that are damaged or hostile: refused or concealed, never a crash, a hang or another file."""

import contextlib
import io
import os
import pathlib
import re
import resource
import signal
import struct
import time

import numpy as np
import pytest
import torch
from clip_oracle import ALL, av, encode, index_folder, joined, remuxed  # noqa: F401

from polydpo_fast import ClipLimits, DecodeError, decode_clips
from polydpo_fast.video import Clip, mp4, opening
from polydpo_fast.video.mp4 import check_counts

CLIP = encode(30)


def packets(data):
    """[(pts, place, size, key)] in the order in which they are stored."""
    with av.open(io.BytesIO(data)) as container:
        return [(p.pts, p.pos, p.size, p.is_keyframe) for p in container.demux(video=0) if p.pts is not None]


def decoded(data, **options):
    options = {**dict(frames=30, size=(48, 64), start=0.0, dtype=torch.uint8, threads=1), **options}
    return decode_clips([data], [CLIP], **options)


def overwritten(data, place, size, value=0):
    return data[:place] + bytes([value]) * size + data[place + size :]


# ------------------------------------------------------------------------------------------------- concealed


@pytest.mark.parametrize("codec", ALL)
def test_a_lost_packet_is_concealed(codec):
    """Frames before it and from the next keyframe on are exact."""
    data = encode(30, codec=codec, g="10", bf="0")
    found = packets(data)
    exact = decoded(data).pixels[0]
    _, place, size, _ = found[13]
    broken = overwritten(data, place + size // 3, size - size // 3)
    loose = decoded(broken, strict=False)
    assert torch.equal(loose.pixels[0, :, :13], exact[:, :13])
    key = next(k for k, p in enumerate(found) if k > 13 and p[3])
    assert torch.equal(loose.pixels[0, :, key:], exact[:, key:])
    try:
        strict = decoded(broken)
    except DecodeError:
        assert loose.concealed[0] > 0
    else:  # some codecs take any bits for a picture
        assert torch.equal(strict.pixels, loose.pixels)
        assert loose.concealed[0] == 0
    assert loose.concealed[1] == 0


def without_slice(data, k):
    """The k-th packet's slices made another kind of NAL unit, one that H.264 has no use for."""
    _, place, size, _ = packets(data)[k]
    at, end = place, place + size
    data = bytearray(data)
    while at < end:
        length = struct.unpack(">I", data[at : at + 4])[0]
        if data[at + 4] & 31 in (1, 5):
            data[at + 4] = 30
        at += 4 + length
    return bytes(data)


def test_the_frame_before_stands_in():
    data = encode(30, bf="0", g="30")
    exact = decoded(data).pixels[0]
    broken = without_slice(data, 29)
    with pytest.raises(DecodeError, match=r"win\[0\]"):
        decoded(broken)
    loose = decoded(broken, strict=False)
    assert loose.concealed.tolist() == [1, 0]
    assert torch.equal(loose.pixels[0, :, :29], exact[:, :29])
    assert torch.equal(loose.pixels[0, :, 29], exact[:, 28])
    planes = decoded(broken, strict=False, dtype="yuv420")
    assert torch.equal(planes.pixels[0, 29], planes.pixels[0, 28])


def test_the_frame_before_stands_in_also_where_it_is_not_wanted_itself():
    data = encode(30, bf="0", g="6", **{"x264-params": "scenecut=0"})
    exact = decoded(data).pixels[0]
    broken = data
    for k in range(12, 18):  # a whole group: what is shown before it lies before the place to seek to
        broken = without_slice(broken, k)
    loose = decoded(broken, frames=2, start=14 / 24, fps=24, strict=False)
    assert torch.equal(loose.pixels[0], exact[:, [11, 11]])
    assert loose.concealed.tolist() == [2, 0]


def test_the_frame_after_stands_in_at_the_beginning():
    data = encode(30, bf="0", g="6", **{"x264-params": "scenecut=0"})
    exact = decoded(data).pixels[0]
    broken = data
    for k in range(6):
        broken = without_slice(broken, k)
    loose = decoded(broken, strict=False)
    assert loose.concealed.tolist() == [6, 0]
    assert torch.equal(loose.pixels[0, :, :6], exact[:, [6] * 6])
    assert torch.equal(loose.pixels[0, :, 6:], exact[:, 6:])


def test_nothing_to_show_is_an_error_all_the_same():
    broken = CLIP
    for k in range(30):
        broken = without_slice(broken, k)
    for strict in (True, False):
        with pytest.raises(DecodeError, match=r"win\[0\]") as error:
            decoded(broken, strict=strict)
    assert "none of its frames can be decoded" in error.value.failures[0].reason


@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_clips_that_are_cut_off(tmp_path, container):
    """MP4 with its tables in front, as for the web."""
    data = encode(30, container=container, bf="0")
    if container == "mp4":
        path, options = str(tmp_path / "clip.mp4"), {"movflags": "faststart"}
        with av.open(io.BytesIO(data)) as source, av.open(path, "w", options=options) as output:
            stream = output.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.dts is not None:
                    packet.stream = stream
                    output.mux(packet)
        data = pathlib.Path(path).read_bytes()
        assert data.index(b"moov") < data.index(b"mdat")
    exact = decoded(data).pixels[0]
    cut = data[: packets(data)[20][1] + 30]
    with pytest.raises(DecodeError, match=r"win\[0\]"):
        decoded(cut)
    loose = decoded(cut, strict=False, short="repeat")
    assert torch.equal(loose.pixels[0, :, :20], exact[:, :20])
    if container == "mp4":
        between = data[: packets(data)[20][1]]
        with pytest.raises(DecodeError, match="it is cut off: it holds 20 of 30 packets"):
            decoded(between, short="repeat")
        assert torch.equal(decoded(between, strict=False, short="repeat").pixels[0, :, :20], exact[:, :20])
    with pytest.raises(DecodeError, match=r"it ends after 0.[89]\d+ s \(2\d frames\)"):
        decoded(cut, strict=False)


def test_an_mp4_whose_tables_are_cut_off_says_so():
    """They come last, but where a file was prepared for the web."""
    moov = CLIP.index(b"moov") - 4
    size = int.from_bytes(CLIP[moov : moov + 4], "big")
    assert moov + size == len(CLIP)
    udta = CLIP.index(b"udta") - 4  # behind all that FFmpeg needs
    for cut in (40, moov // 2, moov, moov + 20, udta - 20, udta + 20, len(CLIP) - 1):
        with pytest.raises(DecodeError) as error:
            decoded(CLIP[:cut])
        told = f"its moov box has {size} bytes, of which {cut - moov} are there"
        if cut < moov + 8:
            told = "it has no moov box"
        assert told in error.value.failures[0].reason
        if cut > udta:  # nothing of the frames is missing
            loose = decoded(CLIP[:cut], strict=False)
            assert torch.equal(loose.pixels[0], loose.pixels[1])
            assert loose.concealed.tolist() == [1, 0]
        else:
            with pytest.raises(DecodeError, match="cut off"):
                decoded(CLIP[:cut], strict=False)


def test_a_fragment_whose_table_is_cut_off_is_told():
    data = remuxed(CLIP, movflags="frag_keyframe+empty_moov+default_base_moof")
    assert decoded(data).ok.all()
    last = data.rindex(b"moof") - 4
    with pytest.raises(DecodeError, match=r"its moof box has \d+ bytes, of which 30 are there"):
        decoded(data[: last + 30], frames=1)
    assert decoded(data[: last + 30], frames=1, strict=False).concealed.tolist() == [1, 0]
    both = decode_clips([data[: last + 30]], [data[: last + 30]], frames=1, size=32, strict=False)
    assert torch.equal(both.concealed, torch.tensor([1, 1]))  # numbers, not flags


@pytest.mark.parametrize("flags", ["dash+global_sidx", "dash", "frag_keyframe"])
def test_a_file_that_ends_between_fragments_is_told_where_an_index_lists_them(tmp_path, flags):
    """One index of all fragments, one before each, and none: of the last two nothing tells that there were more."""
    with av.open(io.BytesIO(CLIP)) as source:
        movflags = f"frag_keyframe+empty_moov+default_base_moof+{flags}"
        with av.open(str(tmp_path / "clip.mp4"), "w", options={"movflags": movflags}) as output:  # which is read again
            stream = output.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.dts is not None:
                    packet.stream = stream
                    output.mux(packet)
    data = (tmp_path / "clip.mp4").read_bytes()
    assert decoded(data).ok.all()
    cut = data[: data.rindex(b"sidx" if flags == "dash" else b"moof") - 4]
    if flags == "dash+global_sidx":
        with pytest.raises(DecodeError, match="cut off: it holds 3 of the 4 fragments that its index lists"):
            decoded(cut, frames=1)
    assert decoded(cut, frames=1, strict=False).concealed[0] == (flags == "dash+global_sidx")


def test_indexes_between_fragments_are_not_counted_a_second_time():
    """As in a file of parts for streaming that were put together behind an index of all."""

    def index(parts):
        references = struct.pack(">III", 1000, 1000, 1 << 31) * parts
        return box(b"sidx", bytes(4), struct.pack(">IIIIHH", 1, 1000, 0, 0, 0, parts), references)

    moov, fragment = box(b"moov", box(b"trak")), index(1) + box(b"moof")
    assert counted(moov + index(3) + fragment * 3) is None
    assert counted(moov + fragment * 3) is None
    assert "holds 2 of the 3 fragments" in counted(moov + index(3) + fragment * 2)


def test_errors_of_ffmpeg_are_told_in_words():
    """Without the number, and the name that bytes have not."""
    data = encode(30, container="matroska")
    at = data.index(b"\x42\x82\x88matroska") + 3
    for broken, reason in (
        (data[:at] + b"x" + data[at + 1 :], "Invalid data found when processing input"),
        (pathlib.Path("/no/clip"), "No such file or directory: '/no/clip'"),
    ):
        with pytest.raises(DecodeError) as error:
            decoded(broken)
        assert error.value.failures[0].reason == reason


@pytest.mark.parametrize("container", ["mp4", "matroska"])
@pytest.mark.parametrize("strict", [True, False])
def test_flipped_bits_and_truncations_anywhere(container, strict):
    """Only ever a DecodeError, and the other pair is not touched."""
    data = encode(12, container=container)
    alone = decode_clips([CLIP], [CLIP], frames=4, size=16, start=0.0, dtype=torch.uint8).pixels
    random = np.random.default_rng(3)
    outcomes = set()
    for k in range(120):
        if k % 3 == 0:
            bad = data[: random.integers(1, len(data))]
        else:
            bad = bytearray(data)
            for _ in range(random.integers(1, 4)):
                bad[random.integers(len(bad))] ^= 1 << random.integers(8)
        batch = decode_clips(
            [CLIP, bytes(bad)], [CLIP, data], frames=4, size=16, start=0.0, dtype=torch.uint8, strict=strict,
            on_error="mask", limits=ClipLimits(timeout_s=20),
        )  # fmt: skip
        assert batch.ok[0]
        assert torch.equal(batch.pixels[[0, 2]], alone)
        outcomes.add(bool(batch.ok[1]))
    assert outcomes == {True, False}


# --------------------------------------------------------------------------------------------------- hostile


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path, kind):
    path = tmp_path / "clip.mp4"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path = "/dev/zero"
    begin = time.monotonic()
    with pytest.raises(DecodeError, match=r"it is no regular file|Is a directory"):
        decode_clips([path], [path], frames=2, size=8)
    assert time.monotonic() - begin < 5


def referring(data, target, kind=b"url "):
    """The MP4 with its data said to be in another file."""
    at = data.index(b"dref") - 4
    old = struct.unpack(">I", data[at : at + 4])[0]
    if kind == b"url ":
        entry = target + b"\0"
    else:  # QuickTime's alias record, up to what FFmpeg reads: one folder up and down, and the path as its item 2
        name = target.rsplit(b"/", 1)[-1]
        entry = bytes(10 + 28 + 12) + bytes([len(name)]) + name.ljust(63, b"\0") + bytes(16)
        entry += struct.pack(">HH", 1, 1) + bytes(16)
        entry += struct.pack(">HH", 2, len(target)) + target + bytes(len(target) % 2) + struct.pack(">h", -1)
    entry = struct.pack(">I4sI", 12 + len(entry), kind, 0) + entry
    box = struct.pack(">I4sII", 16 + len(entry), b"dref", 0, 1) + entry
    result = bytearray(data[:at] + box + data[at + old :])
    for name in (b"dinf", b"minf", b"mdia", b"trak", b"moov"):
        place = result.index(name) - 4
        result[place : place + 4] = struct.pack(
            ">I", struct.unpack(">I", result[place : place + 4])[0] + len(box) - old
        )
    return bytes(result)


@pytest.mark.parametrize("kind", [b"url ", b"alis"])
def test_no_other_file_is_ever_opened(tmp_path, monkeypatch, kind):
    """A clip that refers to one is refused, or its own bytes alone are looked at, as its time of access tells; also
    where FFmpeg's options did not forbid it."""
    other, path = tmp_path / "other.mp4", tmp_path / "clip.mp4"
    other.write_bytes(encode(30, height=64))
    path.write_bytes(referring(CLIP, (b"" if kind == b"alis" else b"file://") + str(other).encode(), kind))

    def is_read(work):
        os.utime(other, ns=(0, other.stat().st_mtime_ns))
        work()
        return other.stat().st_atime_ns > 0

    def by_ffmpeg_if_allowed():
        with av.open(str(path), options={"enable_drefs": "1", "use_absolute_path": "1"}) as container:
            list(container.demux(video=0))

    def by_us():
        for source in (path, path.read_bytes()):
            for strict in (True, False):
                batch = decode_clips([source], [CLIP], frames=3, size=16, strict=strict, on_error="mask")
                assert not batch.ok[0] or batch.original_size[0].tolist() == [48, 64]

    if not is_read(other.read_bytes):
        pytest.skip("this file system keeps no times of access")
    assert is_read(by_ffmpeg_if_allowed) == (kind == b"alis")  # it knows no other reference
    assert not is_read(by_us)
    monkeypatch.setitem(opening._OPTIONS, "mp4", {"enable_drefs": "1", "use_absolute_path": "1"})
    assert not is_read(by_us)


def test_frames_larger_than_their_header_says_are_refused_by_the_decoder():
    """Before it allocates for them."""
    parts = [encode(8, *shape, codec="libvpx-vp9", container="webm") for shape in ((48, 64), (544, 960))]
    options = dict(frames=10, limits=ClipLimits(pixels=3072))
    with pytest.raises(DecodeError, match=r"win\[0\].*'avcodec_send_packet\(\)' returned 22"):
        decoded(joined(*parts), **options)
    assert decoded(joined(*parts), strict=False, **options).concealed.tolist() == [2, 0]


def counting(samples, size=1):
    """A clip of thirty frames whose table counts more, in no more bytes."""
    data = bytearray(CLIP)
    at = data.index(b"stsz") + 8
    data[at : at + 8] = struct.pack(">II", size, samples)
    at = data.index(b"stsc") + 12
    data[at : at + 12] = struct.pack(">III", 1, samples, 1)
    at = data.index(b"stts") + 12
    data[at : at + 8] = struct.pack(">II", samples, 512)
    return bytes(data)


@pytest.mark.parametrize("strict", [True, False])
def test_a_container_that_counts_more_frames_than_it_holds(strict):
    begin, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DecodeError, match=r"its tables count 200000000 samples; expected at most 4194304"):
        decoded(counting(200_000_000), strict=strict)
    assert time.process_time() - begin < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB
    with pytest.raises(DecodeError):
        decoded(counting(40, 100), strict=strict)


def box(kind, *bodies):
    body = b"".join(bodies)
    return struct.pack(">I4s", 8 + len(body), kind) + body


def table(kind, *numbers):
    return box(kind, struct.pack(f">{1 + len(numbers)}I", 0, *numbers))


def counted(*boxes, most=10**6):
    return check_counts(io.BytesIO(b"".join(boxes)), most, 3)


def test_edits_and_fragments_are_counted_too():
    moov = box(b"moov", box(b"trak", table(b"stsz", 0, 1000), box(b"edts", table(b"elst", 1000))))
    counted(moov)
    with pytest.raises(ValueError, match="its tables count 1000000 samples; expected at most 999999"):
        counted(moov, most=999_999)
    fragment = box(b"moof", box(b"traf", table(b"trun", 2**32 - 1)))
    with pytest.raises(ValueError, match="count 4294967295 samples"):
        counted(fragment)
    counted(box(b"mdat", fragment))  # data may look like anything
    counted(box(b"moov", box(b"udta", struct.pack(">I4s", 7, b"abcd"), fragment)))  # FFmpeg ends at such a length
    with pytest.raises(ValueError, match="its headers are compressed"):
        counted(box(b"moov", box(b"cmov")))
    with pytest.raises(ValueError, match="more than 3 streams"):
        counted(box(b"moov", box(b"trak") * 4))


@pytest.mark.parametrize(
    "hidden",
    [
        box(b"free", box(b"mvhd", bytes(8)), box(b"trak", table(b"stsz", 0, 2**20))),  # FFmpeg takes it for a moov
        box(b"moov", box(b"udta", box(b"meta", bytes(4), box(b"hdlr", bytes(20)), table(b"trun", 2**20)))),
        box(b"moov", box(b"trak", table(b"stsd", 1), box(b"tref", table(b"stsz", 0, 2**20)))),
        box(b"moov", box(b"trak", box(b"stsd", bytes(8), box(b"avc1", bytes(78), table(b"stsz", 0, 2**20))))),
        struct.pack(">I4sQ", 1, b"moov", 2**60) + box(b"trak", table(b"stsz", 0, 2**20)),
        struct.pack(">I4s", 0, b"moov") + struct.pack(">I4s", 2**31, b"trak") + table(b"stsz", 0, 2**20),
        box(b"moov", box(b"trak") * 3) + box(b"moof") * 400_000,
        box(b"moov", box(b"trak") * 3) + table(b"sidx", *[0] * (3 * 400_000)),
        box(b"meta", table(b"hdlr", 0), box(b"iinf", struct.pack(">BxxxI", 1, 2**31))),
        box(b"meta", table(b"hdlr", 0), box(b"iloc", struct.pack(">BxxxHI", 2, 0x4440, 2**31))),
    ],
)
def test_counts_are_found_where_ffmpeg_would_look(hidden):
    with pytest.raises(ValueError, match=r"its tables count \d+ samples"):
        counted(hidden)


def test_headers_have_a_bound(monkeypatch):
    monkeypatch.setattr(mp4, "_MOST_HEADERS", 1000)
    counted(box(b"moov", bytes(900)), box(b"mdat", bytes(2000)), box(b"uuid", bytes(84)))
    with pytest.raises(ValueError, match="its headers have more than 1000 bytes"):
        counted(box(b"moov", bytes(900)), box(b"mdat", bytes(2000)), box(b"uuid", bytes(85)))
    monkeypatch.setattr(mp4, "_MOST_BOXES", 4)
    counted(box(b"mdat") * 3, box(b"moov"))
    with pytest.raises(ValueError, match="it has more than 4 boxes"):
        counted(box(b"mdat") * 4, box(b"moov"))


def test_texts_are_no_tables():
    words = b"An elephant lifts its trunk, Engelstein strung lights, trak, cmov, stsz" + b"\xff" * 40
    data = box(b"moov", box(b"udta", box(b"\xa9cmt", words), box(b"meta", bytes(4), table(b"hdlr", 0),
               box(b"ilst", box(b"\xa9nam", box(b"data", words))))), box(b"uuid", words), box(b"trak"))  # fmt: skip
    counted(data, most=1)
    told = dict.fromkeys(("comment", "title"), words[:60].decode())
    assert decoded(remuxed(CLIP, metadata=told)).ok.all()


@pytest.mark.parametrize(
    "many",
    [
        box(b"uuid", b"trak" + b"stsc" * 500_000),
        box(b"trak", (b"stsc\0\0\0\0\x7f\0\0\0") * 200_000),
        box(b"moov", box(b"abcd") * 2_000_000),
        box(b"abcd") * 2_000_000,
        box(b"moof") * 2_000_000,
        box(b"stsd", b"stsc" * 2_000_000),
    ],
    ids=len,
)
def test_counting_has_a_bound(many):
    """Of two million boxes, or of what looks like them: each is looked at once, and there are not too many."""
    begin = time.process_time()
    with contextlib.suppress(ValueError):
        counted(box(b"moov", box(b"trak")), many)
    assert time.process_time() - begin < 8  # seen: 2, of which nothing is quadratic


def test_a_block_of_another_track_is_missed():
    data = encode(24, container="matroska")
    at = data.index(b"\xa3", packets(data)[12][1] - 16)
    track = at + 1 + 9 - data[at + 1].bit_length()
    assert data[track] == 0x81
    with pytest.raises(DecodeError, match=r"the block that begins at byte \d+ is of no track"):
        decoded(data[:track] + b"\x83" + data[track + 1 :], frames=3, start="center")


@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_nothing_is_read_when_there_is_no_time(container):
    clip = Clip(encode(8, container=container), ClipLimits(), True, 1, None)
    clip.cancel()
    with pytest.raises(TimeoutError), clip.opened():
        pass


def test_opening_has_its_time():
    """FFmpeg looks for a beginning in what follows, and reads on: by way of a file that looks at the clock."""
    webm = encode(8, container="webm", codec="libvpx")
    begin = time.process_time()
    with pytest.raises(DecodeError, match=r"limits.timeout_s"):
        decoded(webm[: len(webm) // 2] + bytes(100_000_000), frames=2, limits=ClipLimits(timeout_s=0.05))
    with pytest.raises(DecodeError, match=r"limits.timeout_s"):
        decoded(box(b"free", b"") * 900_000 + CLIP, frames=2, limits=ClipLimits(timeout_s=0.05))
    assert time.process_time() - begin < 3


@pytest.mark.parametrize(("in_chunk", "entries"), [(48000, 100 * 54), (2**31, 100 * 2386093)])
def test_uncompressed_sound_is_counted_by_its_chunks(in_chunk, entries):
    """A hundred seconds of it have millions of samples, which are nobody's frames."""
    for kind, count in ((b"soun", entries), (b"vide", 2**28)):
        sound = table(b"hdlr", 0) + table(b"stts", 1, 2**28, 1) + table(b"stsz", 2, 2**28)
        sound = sound.replace(table(b"hdlr", 0), box(b"hdlr", bytes(8), kind))
        sound += table(b"stsc", 1, 1, in_chunk, 1) + table(b"stco", 100, *[0] * 100)
        moov = box(b"moov", box(b"trak", sound))
        counted(moov, most=count)
        with pytest.raises(ValueError, match=f"its tables count {count} samples"):
            counted(moov, most=count - 1)


@pytest.mark.parametrize("codec", ["libx264", "libvpx-vp9"])
@pytest.mark.parametrize("live", ["0", "1"])
def test_matroska_that_is_cut_off_anywhere(codec, live):
    """FFmpeg takes what is left for the whole: times would be others, and so would the frames in the middle be."""
    data = remuxed(encode(24, codec=codec), "matroska", live=live, cluster_time_limit="200")
    assert decoded(data, frames=6, start="center").ok.all()
    begins = {place + 4 * k for _, place, _, _ in packets(data) for k in range(-3, 1)}
    passed = []
    for length in range(40, len(data) - 1, 97 if live == "0" else 41):
        try:
            decoded(data[:length], frames=3, start="center")
        except DecodeError:
            continue
        passed.append(length)
    # One that was written as it came has no lengths but those of its blocks: between two it looks whole.
    assert not passed if live == "0" else all(min(abs(length - b) for b in begins) < 60 for length in passed)
    if live == "0":
        loose = decoded(data[: len(data) * 2 // 3], frames=3, start="center", strict=False, short="repeat")
        assert loose.concealed[0] > 0
        assert loose.concealed[1] == 0


def test_a_block_that_is_none_any_more_is_missed():
    """One flipped bit in its type, and FFmpeg passes over it: all frames made from it would be others."""
    data = encode(24, container="matroska")
    lost, exact = 0, decoded(data, frames=3, start="center")
    for _, place, _, _ in packets(data)[1:]:
        at = data.rindex(b"\xa3", 0, place)
        for bit in range(8):
            broken = data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]
            try:
                got = decoded(broken, frames=3, start="center")
            except DecodeError:
                lost += 1
            else:  # another way to say the same
                assert torch.equal(got.pixels, exact.pixels), (at, bit)
    assert lost > 100


def in_groups(data, change=bytes):
    """Matroska whose clusters have no length, with each block in a group of its own, behind something void.

    change: what a group holds.
    """
    parts, done = [], 0
    for _, place, size, is_key in packets(data):
        at, end = data.rindex(b"\xa3", 0, place - 1), place + 4 + size  # behind track, time and flags
        assert place - at in (2, 3)
        reference = b"" if is_key else b"\xfb\x81\xff"
        group = change(b"\xa1" + data[at + 1 : end] + reference)
        parts += [data[done:at], b"\xec\x82\0\0\xa0\x01" + len(group).to_bytes(7, "big") + group]
        done = end
    whole = b"".join([*parts, data[done:]])
    for found in reversed([*re.finditer(rb"\x1f\x43\xb6\x75", whole)]):
        at = found.end()
        whole = whole[:at] + b"\x01" + b"\xff" * 7 + whole[at + 9 - whole[at].bit_length() :]
    return whole


@pytest.mark.parametrize("codec", ["libx264", "libvpx-vp9"])
def test_groups_in_clusters_without_a_length(codec):
    """As browsers record, and other muxers than FFmpeg's write: the frames are those of plain blocks."""
    data = remuxed(encode(24, codec=codec), "matroska", live="1", cluster_time_limit="200", write_crc32="0")
    assert data.count(b"\x1f\x43\xb6\x75") > 2
    exact, got = (decoded(one, frames=24) for one in (data, in_groups(data)))
    assert torch.equal(got.pixels, exact.pixels)
    tracks = data.rindex(b"\x16\x54\xae\x6b") + 4
    entry = data.index(b"\xae\x01", tracks)
    end = entry + 9 + int.from_bytes(data[entry + 2 : entry + 9], "big")
    assert data[entry + 9 : entry + 12] == b"\xd7\x81\x01"  # the track's number, which need not come first
    body = b"\xec\x81\0" + data[entry + 12 : end] + data[entry + 9 : entry + 12]
    moved = b"\xae\x01" + len(body).to_bytes(7, "big") + body
    moved = data[:tracks] + b"\x01" + len(moved).to_bytes(7, "big") + moved + data[end:]
    assert torch.equal(decoded(moved, frames=24).pixels, exact.pixels)
    for change, reason in (
        (lambda group: group + b"\xa3\x80", "what begins at byte \\d+ is of an unknown type, a3"),
        (lambda group: group + b"\x9b\x84\x01", "what begins at byte \\d+ has 4 bytes"),
        (lambda group: group.replace(b"\x81", b"\x83", 1), "the block that begins at byte \\d+ is of no track"),
    ):
        with pytest.raises(DecodeError, match=reason):
            decoded(in_groups(data, change), frames=3)


@pytest.mark.parametrize(
    ("kind", "name", "most"),
    [
        (b"\x12\x54\xc3\x67", "tags", 1 << 22),
        (b"\x1c\x53\xbb\x6b", "cues", 1 << 21),
        (b"\x19\x41\xa4\x69", "attachments", 1 << 26),
    ],
)
def test_what_ffmpeg_would_keep_of_matroska_is_bounded(kind, name, most):
    data = encode(4, container="matroska")
    at = data.index(b"\x1f\x43\xb6\x75")
    segment = data.index(b"\x18\x53\x80\x67") + 4
    for size, is_fine in ((1000, True), (most + 1, False)):
        more = kind + b"\x01" + size.to_bytes(7, "big") + b"\xec\x01" + (size - 9).to_bytes(7, "big") + bytes(size - 9)
        whole = data[:segment] + b"\x01" + b"\xff" * 7 + data[segment + 8 : at] + more + data[at:]
        limits = ClipLimits(frames=1 << 16)
        if is_fine:
            assert decoded(whole, frames=4, limits=limits, short="repeat").ok.all()
        else:
            with pytest.raises(DecodeError, match=f"its {name} have {size} bytes, more than {most}"):
                decoded(whole, frames=4, limits=limits)


def test_of_a_pair_that_failed_nothing_is_told():
    """Whether it failed before its first frame or after it."""
    late = overwritten(CLIP, packets(CLIP)[20][1], packets(CLIP)[20][2], 0xFF)
    for bad in (late, b"no clip"):
        got = decode_clips([CLIP, bad], [CLIP, CLIP], frames=30, size=16, start=0.0, on_error="mask")
        assert got.ok.tolist() == [True, False]
        assert not got.original_size[[1, 3]].any()
        assert got.original_size[[0, 2]].all()
        assert not got.times[1].any()
        assert not got.pixels[[1, 3]].any()
        assert [got.matrix[k] for k in (1, 3)] == ["bt709"] * 2


def test_no_frames_at_all():
    empty = bytearray(CLIP)
    for table, at in ((b"stsz", 12), (b"stts", 8), (b"stsc", 8), (b"stco", 8), (b"stss", 8), (b"ctts", 8)):
        place = empty.find(table)
        if place > 0:
            empty[place + at - 4 + 4 : place + at + 4] = bytes(4)
    with pytest.raises(DecodeError, match=r"win\[0\]"):
        decoded(bytes(empty))


@pytest.mark.parametrize("kind", [bytearray, memoryview, lambda data: np.frombuffer(data, np.uint8)])
def test_bytes_like_objects_are_read_where_they_are(kind):
    data = encode(20)
    source = kind(data)
    assert torch.equal(decoded(source, frames=20).pixels, decoded(data, frames=20).pixels)
    if kind is bytearray:
        source.append(0)  # nobody holds it any more


def test_large_buffers_are_not_copied():
    room = bytearray(CLIP) + struct.pack(">I4s", (1 << 28) - 8, b"free") + bytes((1 << 28) - 16)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    decoded(room)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 16  # KiB


def test_an_interrupt_ends_the_clips_that_are_under_way(monkeypatch):
    frames, plain = [], Clip._decoded

    def slowly(self, *arguments):
        for frame in plain(self, *arguments):
            frames.append(1)
            if len(frames) == 3:
                os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.02)
            yield frame

    monkeypatch.setattr(Clip, "_decoded", slowly)
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            decode_clips([CLIP] * 4, [CLIP] * 4, frames=30, size=16, threads=2)
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(frames) < 30  # of 240


def interrupt(*_):
    raise KeyboardInterrupt


def test_neither_descriptors_nor_memory_grow(tmp_path):
    path, bad = tmp_path / "clip.mp4", tmp_path / "bad.mp4"
    path.write_bytes(CLIP)
    bad.write_bytes(without_slice(CLIP, 3)[: len(CLIP) - 60])

    def rounds(count):
        for k in range(count):
            decode_clips(
                [path, bad, bytearray(CLIP)], [CLIP, path, bad], frames=4, size=64, strict=k % 2 == 0, on_error="mask"
            )
        with open("/proc/self/statm") as file:
            return len(os.listdir("/proc/self/fd")), int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    descriptors, memory = rounds(10)
    later_descriptors, later_memory = rounds(50)
    assert later_descriptors == descriptors
    assert later_memory - memory < 16 << 20


# ------------------------------------------------------------------------------------------------ other streams


def beside_others(data, container, copies=1, sound=0, cover=False):
    """The clip with its stream so many times; so many frames of sound behind it; a cover before it."""
    file = io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(file, "w", format=container) as output:
        if cover:
            picture = output.add_stream("mjpeg", rate=1)
            picture.width, picture.height, picture.pix_fmt = 32, 32, "yuvj420p"
            picture.disposition = av.stream.Disposition.attached_pic
        streams = [output.add_stream_from_template(source.streams.video[0]) for _ in range(copies)]
        voice = output.add_stream("aac", rate=16000) if sound else None
        if cover:
            output.mux(picture.encode(av.VideoFrame(32, 32, "yuvj420p")))
            output.mux(picture.encode())
        for packet in source.demux(video=0):
            for stream in streams if packet.dts is not None else []:
                copy = av.Packet(bytes(packet))
                copy.pts, copy.dts, copy.time_base = packet.pts, packet.dts, packet.time_base
                copy.is_keyframe, copy.stream = packet.is_keyframe, stream
                output.mux(copy)
        for index in range(sound):
            samples = np.random.default_rng(index).normal(0, 0.2, (1, 1024)).astype(np.float32)
            frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
            frame.rate, frame.pts = 16000, 1024 * index
            output.mux(voice.encode(frame))
        if sound:
            output.mux(voice.encode())
    return file.getvalue()


@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_streams_are_counted(container):
    data = beside_others(encode(5), container, copies=7)
    options = dict(frames=5, size=16, on_error="mask")
    assert decoded(data, **options, limits=ClipLimits(streams=7)).ok.all()
    for most in (1, 6):
        failed = decoded(data, **options, limits=ClipLimits(streams=most))
        assert failed.errors[0].reason == f"it has more than {most} streams (limits.streams)"


def sounds(data):
    """Where they lie."""
    with av.open(io.BytesIO(data)) as container:
        return [(data.index(bytes(p)), p.size) for p in container.demux(audio=0) if p.size > 8]


@pytest.mark.parametrize("container", ["mp4", "mov", "matroska"])
def test_sound_is_never_decoded(container):
    """It may be any bytes."""
    data = beside_others(CLIP, container, sound=40)
    expected = decoded(CLIP).pixels[0]
    assert torch.equal(decoded(data).pixels[0], expected)
    noise = bytearray(data)
    for place, size in sounds(data):
        noise[place : place + size] = np.random.default_rng(place).bytes(size)
    assert len(sounds(data)) >= 40
    assert torch.equal(decoded(bytes(noise)).pixels[0], expected)


def test_a_cover_is_no_clip():
    """Also where it is the first stream, in an MP4 whose metadata come first."""
    data = beside_others(CLIP, "mp4", cover=True)
    track, metadata = data.index(b"trak") - 4, data.index(b"udta") - 4
    size = int.from_bytes(data[metadata : metadata + 4], "big")
    assert track < metadata
    data = data[:track] + data[metadata : metadata + size] + data[track:metadata] + data[metadata + size :]
    with av.open(io.BytesIO(data)) as opened:
        assert [s.codec_context.name for s in opened.streams.video] == ["mjpeg", "h264"]
    assert torch.equal(decoded(data).pixels[0], decoded(CLIP).pixels[0])
