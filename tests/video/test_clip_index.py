"""`decode_clips`: kept indexes, sparse sampling, and what a plan costs."""

import io
import os
import time
from fractions import Fraction

import numpy as np
import pytest
import torch
from clip_oracle import ALL, assert_frames, av, encode, full_decode, index_folder  # noqa: F401

from polydpo_fast import ClipLimits, DecodeError, cache, decode_clips
from polydpo_fast.video import Clip, index, matroska
from polydpo_fast.video.timeline import Timeline, choose_times

CLIP = encode()


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(CLIP)
    return path


@pytest.fixture
def builds(monkeypatch):
    """How often a clip was indexed."""
    count = []
    build = index._built
    monkeypatch.setattr(index, "_built", lambda *arguments: count.append(1) or build(*arguments))
    return count


# ------------------------------------------------------------------------------------------------------ kept


def decoded(*sources, **options):
    return decode_clips([*sources], [*sources], frames=4, size=16, dtype=torch.uint8, threads=1, **options)


def test_a_file_is_indexed_once(path, builds, index_folder):  # noqa: F811
    first = decoded(path)
    assert len(builds) == 1  # the loser's finds the winner's
    assert len(list(index_folder.iterdir())) == 1
    again = decoded(str(path))
    assert len(builds) == 1
    assert torch.equal(first.pixels, again.pixels)
    assert torch.equal(first.times, again.times)
    assert torch.equal(first.pixels, decoded(CLIP).pixels)  # bytes each time
    assert len(builds) == 3
    decoded(path, strict=False)
    assert len(builds) == 4


def test_blocks_of_matroska_are_gone_through_once(tmp_path, builds, monkeypatch):
    """Not for each epoch; and again in a file that has changed."""
    data = encode(96, container="matroska", bf="0")
    path = tmp_path / "clip.mkv"
    path.write_bytes(data)
    clusters = data.count(b"\x1f\x43\xb6\x75")
    reads = []
    plain = matroska._Walk._bytes
    monkeypatch.setattr(matroska._Walk, "_bytes", lambda self, at: reads.append(at) or plain(self, at))
    first = decoded(path)
    assert len(reads) > 2 * 96  # each block and its track, at the least
    del reads[:]
    again = decoded(path)
    assert len(builds) == 1
    assert torch.equal(first.pixels, again.pixels)
    assert len(reads) < 2 * (clusters + 40)

    # A block in the middle is of no track: of the same size, at another time.
    with av.open(io.BytesIO(data)) as container:
        place = next(p.pos for k, p in enumerate(container.demux(video=0)) if k == 60)
    assert data[place] == 0x81
    facts = path.stat()
    path.write_bytes(data[:place] + b"\x82" + data[place + 1 :])
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1))
    with pytest.raises(DecodeError, match="is of no track"):
        decoded(path)
    assert decoded(path, strict=False).concealed.tolist() == [1, 1]
    assert decoded(path, strict=False).concealed.tolist() == [1, 1]  # kept
    with pytest.raises(DecodeError, match="is of no track"):
        decoded(path)


def test_a_file_that_changes_is_indexed_again(path, builds):
    assert decoded(path).times[0, 0] > 0.5
    path.write_bytes(encode(9))
    assert decoded(path).times[0, 0] < 0.2
    assert len(builds) == 2
    facts = path.stat()
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1))
    decoded(path)
    assert len(builds) == 3


def test_another_folder(path, builds, tmp_path, index_folder):  # noqa: F811
    decoded(path, cache=tmp_path / "here")
    decoded(path, cache=str(tmp_path / "here"))
    assert len(builds) == 1
    assert len(list((tmp_path / "here").iterdir())) == 1
    assert list(index_folder.iterdir()) == []
    decoded(path, cache=os.devnull)  # no folder at all
    assert len(builds) == 3
    with pytest.raises(TypeError, match="cache is a bool; expected the path of a folder, or None"):
        decoded(path, cache=False)


@pytest.mark.parametrize(
    "change",
    [
        dict(pts=np.array([], np.int64)),
        dict(pts=np.array([3, 2, 1], np.int64)),
        dict(pts=np.array([[0, 1]], np.int64)),
        dict(pts=np.array([0.0, 1.0])),
        dict(keys=np.array([512, 0], np.int64)),
        dict(unit=np.array([1, 0], np.int64)),
        dict(unit=np.array([1], np.int64)),
        dict(pts=None),
        dict(depth=np.array([17], np.int64)),
        dict(depth=np.array([-1], np.int64)),
        dict(depth=np.array([], np.int64)),
        dict(damaged=np.array([], np.int64)),
    ],
)
def test_kept_indexes_are_checked(path, builds, index_folder, change):  # noqa: F811
    expected = decoded(path).pixels
    (kept,) = index_folder.iterdir()
    with np.load(kept) as stored:
        arrays = {**dict(stored), **change}
    np.savez(kept, **{name: array for name, array in arrays.items() if array is not None})
    assert torch.equal(decoded(path).pixels, expected)
    assert len(builds) == 2


def test_an_index_that_tells_of_other_frames_is_an_error_not_another_picture(path, index_folder):  # noqa: F811
    decoded(path)
    (kept,) = index_folder.iterdir()
    with np.load(kept) as stored:
        arrays = {**dict(stored), "pts": stored["pts"] + 1}
    np.savez(kept, **arrays)
    with pytest.raises(DecodeError, match=r"its frame at \d.\d+ s does not decode"):
        decoded(path)


def test_limits_hold_for_kept_indexes(path):
    decoded(path)
    with pytest.raises(DecodeError, match=r"it has more than 29 frames \(limits.frames\)"):
        decoded(path, limits=ClipLimits(frames=29))


def test_failures_are_not_kept(path, builds, index_folder):  # noqa: F811
    path.write_bytes(CLIP[:200])
    for _ in range(2):
        with pytest.raises(DecodeError):
            decoded(path)
    assert list(index_folder.iterdir()) == []


def test_the_folder_is_bounded(tmp_path, index_folder, builds, monkeypatch):  # noqa: F811
    """The oldest go; other files stay, and what somebody is writing."""
    monkeypatch.setattr(cache, "_ROUNDS", 1)
    paths = [tmp_path / f"{k}.mp4" for k in range(4)]
    names = {}
    for k, path in enumerate(paths):
        path.write_bytes(CLIP)
        decoded(path)
        (new,) = {*index_folder.iterdir()}.difference(names.values())
        os.utime(new, (1000 + k, 1000 + k))
        names[k] = new
    others = [index_folder / name for name in ("notes.txt", "a.npz", "tmpabc.part")]
    abandoned = index_folder / "tmpold.part"
    for other in (*others, abandoned):
        other.write_bytes(bytes(1 << 20))
    os.utime(abandoned, (1000, 1000))
    os.utime(others[0], (1000, 1000))
    monkeypatch.setattr(cache, "_MOST_BYTES", sum(names[k].stat().st_size for k in (2, 3)) * 7 // 4)
    last = tmp_path / "last.mp4"
    last.write_bytes(CLIP)
    decoded(last)
    assert not names[0].exists()
    assert not names[1].exists()
    assert names[2].exists()
    assert names[3].exists()
    assert all(other.exists() for other in others)
    assert not abandoned.exists()
    assert len([*index_folder.iterdir()]) == 3 + len(others)
    del builds[:]
    decoded(paths[3])
    assert builds == []
    decoded(paths[0])
    assert len(builds) == 1


# ---------------------------------------------------------------------------------------------------- sparse

SPARSE = {
    **{codec: dict(codec=codec) for codec in ALL},
    "vp8": dict(codec="libvpx", container="webm"),
    "pyramid": {"bf": "7", "x264-params": "keyint=40:b-pyramid=normal:b-adapt=0:ref=4"},
    "strict pyramid, open groups": {"bf": "5", "x264-params": "keyint=12:open-gop=1:b-pyramid=strict:b-adapt=0"},
    "weighted, no deblocking": {"bf": "3", "x264-params": "keyint=40:weightb=1:weightp=2:no-deblock=1:b-adapt=0"},
    "temporal direct": {"bf": "3", "x264-params": "keyint=40:direct=temporal:b-adapt=0"},
    "interlaced": {"bf": "3", "x264-params": "keyint=40:interlaced=1:b-adapt=0"},
    "intra refresh": {"bf": "3", "x264-params": "keyint=8:intra-refresh=1"},
    "mpeg4 with B-frames": dict(codec="mpeg4", bf="3", g="30"),
    "hevc pyramid": {
        "codec": "libx265",
        "x265-params": "bframes=7:b-adapt=0:b-pyramid=1:temporal-layers=1:keyint=40:log-level=none",
    },
    "hevc, temporal layers": {
        "codec": "libx265",
        "x265-params": "bframes=7:b-adapt=0:b-pyramid=1:temporal-layers=3:keyint=40:log-level=none",
    },
    "hevc, parameters with every keyframe": {
        "codec": "libx265",
        "x265-params": "bframes=3:b-adapt=0:keyint=8:repeat-headers=1:log-level=none",
    },
    "av1, low delay": {"codec": "libsvtav1", "g": "24", "svtav1-params": "pred-struct=1"},
    "av1, in layers": {"codec": "libsvtav1", "g": "60", "svtav1-params": "hierarchical-levels=4"},
    "hevc, open groups": {"codec": "libx265", "x265-params": "bframes=4:open-gop=1:keyint=8:log-level=none"},
}


@pytest.mark.parametrize("kind", SPARSE)
def test_skipping_frames_that_nobody_needs_changes_nothing(kind):
    """Every third, and every seventh from an odd start: bit for bit those of all frames."""
    data = encode(50, **SPARSE[kind])
    whole = decode_clips([data], [data], frames=50, size=(48, 64), dtype=torch.uint8).pixels[0]
    assert_frames(whole, [frame for _, frame in full_decode(data)])
    for step, first in ((3, 0), (7, 5)):
        count = (50 - first + step - 1) // step
        options = dict(frames=count, size=(48, 64), fps=Fraction(24, step), start=first / 24, dtype=torch.uint8)
        for threads in (1, 8):  # and by FFmpeg's own threads
            sparse = decode_clips([data], [data], threads=threads, **options)
            assert torch.equal(sparse.pixels[0], whole[:, first::step])


def count_decoded(monkeypatch):
    """The frames that come out of FFmpeg."""
    count = []
    plain = Clip._decoded

    def counting(self, *arguments):
        for frame in plain(self, *arguments):
            count.append(1)
            yield frame

    monkeypatch.setattr(Clip, "_decoded", counting)
    return count


@pytest.mark.parametrize(("codec", "pyramid", "references"), [
    ("libx264", "none", 13), ("libx264", "normal", 25), ("libx265", "0", 13), ("libx265", "1", 25),
])  # fmt: skip
def test_frames_that_nobody_needs_are_not_decoded(monkeypatch, codec, pyramid, references):
    """Of 49: three of four are B-frames, and from none of these, or from one of three, is another made."""
    options = f"bframes=3:keyint=60:b-pyramid={pyramid}:b-adapt=0:scenecut=0"
    data = encode(49, codec=codec, **{codec.replace("lib", "") + "-params": options + ":log-level=none"})
    count = count_decoded(monkeypatch)
    decode_clips([data], [data], frames=4, size=16, fps=Fraction(24, 13), start=0.0)
    assert len(count) <= 2 * (references + 4)


def test_spare_frames_of_av1_are_not_decoded(monkeypatch):
    """Of 49, every second one is made from others, and no other from it."""
    data = encode(49, codec="libsvtav1", g="60", **{"svtav1-params": "pred-struct=1"})
    count = count_decoded(monkeypatch)
    decode_clips([data], [data], frames=4, size=16, fps=Fraction(24, 13), start=0.0)
    assert len(count) <= 2 * (25 + 4)


@pytest.mark.parametrize("group", [2, 12, 60])
def test_seeking_decodes_no_more_than_going_through(monkeypatch, group):
    data = encode(60, g=str(group), bf="0", **{"x264-params": "scenecut=0"})
    count = count_decoded(monkeypatch)
    for step in (2, 5, 13, 30):
        count.clear()
        frames = 59 // step + 1
        decode_clips([data], [data], frames=frames, size=16, fps=Fraction(24, step), start=0.0, threads=1)
        through = 2 * (step * (frames - 1) + 1)
        assert len(count) <= through
        if group == 12 and step == 30:
            assert len(count) <= 2 * (1 + 7)


# ------------------------------------------------------------------------------------------------------ cost


def test_a_million_frames_are_planned_in_no_time():
    pts = np.arange(1_000_000, dtype=np.int64) * 512
    arms = Timeline(pts, Fraction(1, 12288)), Timeline(pts, Fraction(1, 15360))
    begin = time.process_time()
    for options in ((None, "center", 0.0), (None, "random", 0.7), (None, 3000.0, 0.0), (16, "random", 0.3)):
        times = choose_times(arms, 81, *options, "error")
        for arm in arms:
            assert len(arm.shown_at(times, "error")) == 81
    assert time.process_time() - begin < 0.25


def test_a_timeline_of_any_integers():
    """No overflow at the ends of 64 bits, and no time is lost to floats."""
    low, high = -(2**63), 2**63 - 1
    timeline = Timeline(np.array([low, 0, high], np.int64), Fraction(1, 90000))
    assert timeline.duration() == Fraction(2 * high - low, 90000)
    assert timeline.times(0, 3) == [0, Fraction(-low, 90000), Fraction(high - low, 90000)]
    assert timeline.shown_at(timeline.times(0, 3), "error") == [low, 0, high]
    assert timeline.shown_at([timeline.duration() * 5], "repeat") == [high]
    assert timeline.begun(Fraction(1, 90001)) == 1
    assert timeline.begun(timeline.duration() * 3) == 3


@pytest.mark.parametrize(("between", "group"), [(0, 100), (2, 10)])
def test_mpeg_4_is_not_decoded_from_what_only_calls_itself_a_key(between, group):
    """FFmpeg would do so, without an error, and show something else: also from what comes a little after a real one."""
    data = encode(40, codec="mpeg4", bf=f"{between}", g=f"{group}")
    untold = data.replace(b"stss", b"free")  # without this table all packets are keys
    assert untold != data
    for start in (0.5, 0.9, 28 / 24):
        options = dict(frames=3, start=start, size=(48, 64), dtype=torch.uint8)
        got = decode_clips([untold], [data], **options)
        assert torch.equal(got.pixels[0], got.pixels[1])
        assert not got.concealed.any()


def test_hidden_frames_of_vp8_are_no_frames():
    """Made by hand: encoders hide those that only others are made from."""
    hidden, file = {7, 15, 23}, io.BytesIO()
    whole = encode(30, codec="libvpx", container="webm", g="60")
    with av.open(io.BytesIO(whole)) as source, av.open(file, "w", format="webm") as output:
        stream = output.add_stream_from_template(source.streams.video[0])
        for index, packet in enumerate(p for p in source.demux(video=0) if p.pts is not None):
            data = bytearray(bytes(packet))
            if index in hidden:
                data[0] &= ~0x10
            copy = av.Packet(bytes(data))
            copy.pts, copy.dts, copy.time_base = packet.pts, packet.dts, packet.time_base
            copy.is_keyframe, copy.stream = packet.is_keyframe, stream
            output.mux(copy)
    shown = [frame for _, frame in full_decode(file.getvalue())]
    assert len(shown) == 27
    for options, places in ((dict(frames=27), range(27)), (dict(frames=12), range(7, 19))):
        start = 0.0 if len(places) == 27 else "center"
        got = decode_clips([file.getvalue()] * 1, [CLIP], start=start, size=(48, 64), dtype=torch.uint8, **options)
        assert_frames(got.pixels[0], [shown[k] for k in places])


def uncoded(packet, bits=5):
    """A frame of MPEG-4 as one that is not coded: vop_coded is 0, then what fills the byte. bits: of its time."""
    data = bytes(packet)
    at = data.index(b"\0\0\1\xb6") + 4
    fields = "".join(f"{byte:08b}" for byte in data[at : at + 8])
    coded = fields.index("0", 2) + 1 + 1 + bits + 1  # type, whole seconds, marker, time, marker
    fields = fields[:coded] + "00"
    fields += "1" * (-len(fields) % 8)
    return data[:at] + bytes(int(fields[k : k + 8], 2) for k in range(0, len(fields), 8))


@pytest.mark.parametrize("container", ["mp4", "matroska"])
@pytest.mark.parametrize("rate", [24, 30000])
def test_frames_of_mpeg_4_that_are_not_coded_are_no_frames(container, rate):
    """The one before stays, as in a full decode."""
    left_out, file = {5, 6, 12}, io.BytesIO()
    whole = encode(20, codec="mpeg4", bf="0", container=container, rate=rate)
    with av.open(io.BytesIO(whole)) as source, av.open(file, "w", format=container) as output:
        stream = output.add_stream_from_template(source.streams.video[0])
        for index, packet in enumerate(p for p in source.demux(video=0) if p.pts is not None):
            copy = av.Packet(uncoded(packet, (rate - 1).bit_length()) if index in left_out else bytes(packet))
            copy.pts = copy.dts = round(index / 24 / packet.time_base)
            copy.time_base, copy.is_keyframe, copy.stream = packet.time_base, packet.is_keyframe, stream
            output.mux(copy)
    shown = full_decode(file.getvalue())
    assert len(shown) == 17
    options = dict(size=(48, 64), start=0.0, dtype=torch.uint8)
    got = decode_clips([file.getvalue()], [file.getvalue()], frames=17, **options)
    assert_frames(got.pixels[0], [frame for _, frame in shown])
    held = decode_clips([file.getvalue()], [file.getvalue()], frames=8, fps=24, **options)
    assert_frames(held.pixels[0], [shown[k][1] for k in (0, 1, 2, 3, 4, 4, 4, 5)])


@pytest.mark.parametrize("codec", ["libx264", "libx265", "mpeg4", "libvpx-vp9"])
def test_empty_samples_are_no_frames(codec):
    """In MP4: the frame before stays. Here that of a frame from which no other is made."""
    options = {"x265-params": "b-pyramid=0:log-level=none"} if codec == "libx265" else {}
    if codec == "libvpx-vp9":
        options = {"auto-alt-ref": "0", "lag-in-frames": "0"}
    data = encode(20, codec=codec, **options)
    with av.open(io.BytesIO(data)) as container:
        packets = [(p.pts, p.pos, p.size) for p in container.demux(video=0) if p.pts is not None]
    latest = np.maximum.accumulate([pts for pts, *_ in packets])
    # The last of the frames that are shown before one that was stored before them; in VP9 the last of all.
    empty = next((k for k in range(9, 19) if packets[k][0] < latest[k] < packets[k + 1][0]), 19)
    _, place, size = packets[empty]
    sizes = data.index(b"stsz") + 16 + 4 * empty
    assert int.from_bytes(data[sizes : sizes + 4], "big") == size
    mdat = data.index(b"mdat") - 4
    emptied = bytearray(data)
    emptied[sizes : sizes + 4] = bytes(4)
    emptied[mdat : mdat + 4] = (int.from_bytes(data[mdat : mdat + 4], "big") - size).to_bytes(4, "big")
    emptied = bytes(emptied[:place] + emptied[place + size :])

    times = sorted(pts for pts, *_ in packets)
    gone = times.index(packets[empty][0])
    kept = [k for k in range(20) if k != gone]
    how = dict(size=(48, 64), start=0.0, dtype=torch.uint8)
    exact = decode_clips([data], [data], frames=20, **how).pixels[0]
    for strict in (True, False):
        got = decode_clips([emptied], [emptied], frames=19, strict=strict, **how)
        assert torch.equal(got.pixels[0], exact[:, kept])
        assert not got.concealed.any()
    at = decode_clips([emptied], [emptied], frames=2, fps=24, **{**how, "start": (gone - 1) / 24}, short="repeat")
    assert torch.equal(at.pixels[0], exact[:, [gone - 1, gone - 1]])


def test_ffmpeg_has_no_more_threads_than_a_clip_is_worth(monkeypatch):
    given = []
    begin = Clip.__init__
    monkeypatch.setattr(Clip, "__init__", lambda self, *a: given.append(a[3]) or begin(self, a[0], a[1], a[2], 1, a[4]))
    for threads, own in ((1, 1), (2, 1), (8, 4), (1000, 16)):
        decode_clips([CLIP], [CLIP], frames=1, size=8, threads=threads)
        assert given == [own] * 2
        given.clear()
