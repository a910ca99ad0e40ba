"""Cached latents and text embeddings, against encoding the images of the same loader in each step."""

import dataclasses
import io
import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from data.pairs import Tiny
from diffusion.encoding import TinyVae, encoder
from diffusion.runs import stored
from diffusion.tiny import build
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from polydpo_fast.data import LoaderError, PairError, PairLoader, SourceError, read_ledger
from polydpo_fast.diffusion import (
    LatentPairs,
    PairObjective,
    ReferenceErrors,
    cache_latents,
    fingerprint,
    precompute_reference_errors,
)
from polydpo_fast.diffusion.shards import is_complete

PIXELS = dict(size=2, dtype=torch.uint8)
LOADER = dict(max_bad_rate=1.0, readers=2)
BAD = {3: "win", 8: "read", 16: "lose"}


def images(pairs=20, batch_size=4, bad=BAD, source=None, **options):
    return PairLoader(source or Tiny(pairs, bad), batch_size, **{**PIXELS, **LOADER, **options})


def make(folder, loader=None, vae=None, **options):
    vae = vae or TinyVae()
    cache_latents(loader or images(), encoder(vae), folder, **{**dict(parts={"vae": vae}, shard_pairs=6), **options})
    return folder


@pytest.fixture
def store(tmp_path):
    """Of twenty pairs, three of them bad; in four shards."""
    return make(tmp_path / "store")


def same(cached, batch, encode, dtype=torch.float32):
    """A batch of latents, and the batch of images that it was made of."""
    want = encode(batch)
    both = batch.ok.repeat(2)
    assert torch.equal(cached.pixels[both], want["latents"][both].to(dtype))
    assert not cached.pixels[~both].any()
    words = cached.extra["encoder_hidden_states"]
    assert torch.equal(words[batch.ok], want["encoder_hidden_states"][batch.ok].to(dtype))
    for name in ("index", "weight", "ok", "original_size", "crop_top_left", "flipped"):
        assert torch.equal(getattr(cached, name), getattr(batch, name)), name
    for name in ("keys", "prompts", "category"):
        assert getattr(cached, name) == getattr(batch, name), name
    assert cached.extra["number"] == batch.extra["number"]


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
def test_batches_are_those_of_the_images_encoded(tmp_path, dtype):
    """Three epochs in the same order, with the same pairs in place of bad ones, bit for bit."""
    make(tmp_path, dtype=dtype)
    latents = LatentPairs(tmp_path)
    options = dict(seed=5, last="pad", batch_size=6)
    ours = PairLoader(latents, **LOADER, **options, ledger=tmp_path / "ours.jsonl")
    theirs = images(**options, ledger=tmp_path / "theirs.jsonl")
    assert len(ours) == len(theirs) == 4
    encode = encoder(TinyVae())
    for _ in range(3):
        for cached, batch in zip(ours, theirs, strict=True):
            same(cached, batch, encode, dtype or torch.float32)
    bad = [{line["index"] for line in read_ledger(tmp_path / f"{name}.jsonl")} for name in ("ours", "theirs")]
    assert bad[0] == bad[1] == set(BAD)
    assert next(read_ledger(tmp_path / "ours.jsonl"))["reason"] == (
        "it could not be read or decoded when its latents were to be made"
    )


def test_a_store_is_where_it_was_when_the_program_goes_to_another_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    for folder, place in (("latents", "latents"), ("~/latents", "home/latents")):
        make(folder)
        assert is_complete(folder)
        assert is_complete(tmp_path / place)
        latents = LatentPairs(folder)
        monkeypatch.chdir("/")
        assert latents[0].key == images().source[0].key
        monkeypatch.chdir(tmp_path)
    assert not (tmp_path / "~").exists()


def test_what_is_encoded_in_half_precision_is_stored_in_it(tmp_path):
    encode = encoder(TinyVae())
    half = lambda batch: {name: tensor.bfloat16() for name, tensor in encode(batch).items()}  # noqa: E731
    cache_latents(images(), half, tmp_path, parts={}, shard_pairs=6)
    pair = LatentPairs(tmp_path)[0]
    assert pair.pixels.dtype == pair.extra["encoder_hidden_states"].dtype == torch.bfloat16


def test_ranks_resuming_categories_and_windows_are_those_of_the_images(tmp_path):
    codes = torch.tensor([0] * 15 + [1] * 5, dtype=torch.uint8).numpy()
    source = Tiny(20, blocks=[5, 5, 3, 7], codes=codes)
    latents = LatentPairs(make(tmp_path, images(source=source)))
    assert latents.blocks.tolist() == [5, 5, 3, 7]
    assert latents.categories[0] == ("cat", "dog")
    assert latents.categories[1].tolist() == codes.tolist()
    encode = encoder(TinyVae())
    for options in (dict(window=2), dict(categories="balanced"), dict(rank=1, world_size=2), dict(shuffle=False)):
        ours, theirs = PairLoader(latents, 3, **LOADER, **options), images(source=source, batch_size=3, **options)
        steps, others = iter(ours), iter(theirs)
        same(next(steps), next(others), encode)
        again = PairLoader(LatentPairs(tmp_path), 3, **LOADER, **options)
        again.load_state_dict(json.loads(json.dumps(ours.state_dict())))
        for cached, batch in zip(again, others, strict=True):
            same(cached, batch, encode)


def test_missing_shards_are_shared_out_equally(tmp_path, store, monkeypatch):
    """The ranks agree on which are missing: one may have begun to write when another looks."""
    before = stored(store)
    for name in ("00000-of-00004.safetensors", "00002-of-00004.safetensors"):
        (store / name).unlink()
    agreed = []

    def broadcast(objects):
        agreed.append(list(objects[0]))
        objects[:] = agreed[:1]

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast)
    shares = []
    for rank in range(2):
        make(
            store, images(rank=rank, world_size=2), progress=lambda done, total, rank=rank: shares.append((rank, total))
        )
    assert set(shares) == {(0, 6), (1, 6)}  # by their numbers the first would have had both
    assert agreed == [[0, 2], [2]]
    assert stored(store) == before


def test_crops_and_mirrors_are_drawn_once(tmp_path):
    """By the pair's index, so that ranks and interruptions change nothing."""

    class LargeLosers(Tiny):
        def __getitem__(self, index):
            file = io.BytesIO()
            Image.new("RGB", (9, 7)).save(file, "PNG")
            return dataclasses.replace(super().__getitem__(index), lose=file.getvalue())

    drawn = dict(hflip=0.5, size=1, resize=None, crop="random", seed=3, source=LargeLosers(20))
    told = {}

    def encode(batch):
        for row, index in enumerate(batch.index.tolist()):
            told[index] = [sizes[row :: len(batch)] for sizes in (batch.original_size, batch.crop_top_left)]
        return {"latents": batch.pixels.float()}

    for name, world_size in (("one", 1), ("two", 2)):
        for rank in range(world_size):
            one = images(rank=rank, world_size=world_size, batch_size=3, **drawn)
            cache_latents(one, encode, tmp_path / name, parts={}, shard_pairs=6)
    one, two = (list(PairLoader(LatentPairs(tmp_path / name), 5)) for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a.pixels, b.pixels)
        assert torch.equal(a.flipped, b.flipped)
        assert torch.equal(a.crop_top_left, b.crop_top_left)
    assert 4 < sum(int(batch.flipped.sum()) for batch in one) < 16
    for index, pair in enumerate(map(LatentPairs(tmp_path / "one").__getitem__, range(20))):
        assert all(map(torch.equal, (pair.original_size, pair.crop_top_left), told[index]))
    assert any(not torch.equal(*crops) for _, crops in told.values())
    with pytest.raises(ValueError, match=r"another seed: in the store it is 3, here it is 4"):
        cache_latents(images(**{**drawn, "seed": 4}), encode, tmp_path / "one", parts={}, shard_pairs=6)


@pytest.mark.parametrize("world_size", [2, 3])
def test_any_number_of_ranks_makes_the_same(tmp_path, store, world_size):
    for rank in range(world_size):
        make(tmp_path / "ranks", images(rank=rank, world_size=world_size))
    assert stored(tmp_path / "ranks") == stored(store)
    assert LatentPairs(tmp_path / "ranks").fingerprint == LatentPairs(store).fingerprint


KILLED = """
import sys, time, torch
from data.pairs import Tiny
from diffusion.encoding import TinyVae, encoder
from polydpo_fast.data import PairLoader
from polydpo_fast.diffusion import cache_latents

def slow(batch):
    time.sleep(0.1)
    return encoder(TinyVae())(batch)

source = Tiny(20, {3: "win", 8: "read", 16: "lose"})
images = PairLoader(source, 4, size=2, dtype=torch.uint8, max_bad_rate=1.0)
cache_latents(images, slow, sys.argv[1], parts={"vae": TinyVae()}, shard_pairs=6)
"""


def test_killed_and_begun_again(tmp_path, store, request):
    folder = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(folder)], env={"PYTHONPATH": str(request.config.rootpath / "tests")}
    )
    until = time.monotonic() + 120
    while not list(folder.glob("0*.safetensors")):
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    kept = {path.name: path.stat().st_mtime_ns for path in folder.glob("0*.safetensors")}
    assert 1 <= len(kept) < 4
    (folder / ".00003-of-00004.safetensors.1.part").write_bytes(b"cut off")
    with pytest.raises(
        SourceError, match=r"killed is incomplete: \d of 4 shards are missing \(.*00003-of-00004.safetens"
    ):
        LatentPairs(folder)
    make(folder)
    assert {name: (folder / name).stat().st_mtime_ns for name in kept} == kept
    assert {path.name for path in folder.iterdir()} == {*stored(store), "store.json"}
    assert stored(folder) == stored(store)


def test_of_other_things_they_are_refused(store):
    latents = LatentPairs(store)
    latents.check(vae=TinyVae(), source=images(), dtype="as encoded")
    one, other = fingerprint(TinyVae()), fingerprint(TinyVae(1))
    with pytest.raises(ValueError, match=f"another vae: in the store it is {one}, here it is {other}"):
        latents.check(vae=TinyVae(1))
    with pytest.raises(
        ValueError, match=f"another vae: in the store it is {one}, here it is {fingerprint(TinyVae().half())}"
    ):
        latents.check(vae=TinyVae().half())
    with pytest.raises(ValueError, match="another source: in the store it is tiny:20:0, here it is tiny:20:1"):
        latents.check(source=Tiny(20, version=1))
    with pytest.raises(
        ValueError, match=r'another transform: .*"interpolation": "bilinear".*"interpolation": "bicubic"'
    ):
        latents.check(source=images(interpolation="bicubic"))
    for name, change in {
        "vae": dict(vae=TinyVae(1)),
        "transform": dict(loader=images(interpolation="bicubic")),
        "source": dict(loader=images(21)),
        "dtype": dict(dtype=torch.float16),
    }.items():
        with pytest.raises(ValueError, match=f"was made with another {name}: in the store it is .*, here it is "):
            make(store, **change)


def test_fingerprints_are_those_of_what_was_encoded(tmp_path, store):
    assert LatentPairs(make(tmp_path / "same")).fingerprint == LatentPairs(store).fingerprint
    for name, change in {
        "vae": dict(vae=TinyVae(1)),
        "dtype": dict(dtype=torch.float16),
        "bad": dict(loader=images(19)),
    }.items():
        assert LatentPairs(make(tmp_path / name, **change)).fingerprint != LatentPairs(store).fingerprint


def test_damage_at_opening_is_named(store):
    path = store / "00002-of-00004.safetensors"
    data = path.read_bytes()
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}  # no mapping of what is overwritten
    damages = {
        "Error while deserializing header: incomplete metadata": lambda: path.write_bytes(data[:-1]),
        "header too small": lambda: path.write_bytes(b""),
        "latents is .*float.*|latents is .*F64": lambda: save_file(
            {**tensors, "latents": tensors["latents"].double()}, path, metadata
        ),
        r"latents is \('F32', \(2, 4, 8, 7\)\)": lambda: save_file(
            {**tensors, "latents": tensors["latents"][..., 1:].contiguous()}, path, metadata
        ),
        "ok is None": lambda: save_file({k: v for k, v in tensors.items() if k != "ok"}, path, metadata),
        r"flipped has shape \(5,\); expected 6 rows": lambda: save_file(
            {**tensors, "flipped": tensors["flipped"][:5]}, path, metadata
        ),
        "it belongs to another store, or to another place in this one": lambda: save_file(tensors, path, {"a": "b"}),
    }
    for said, damage in damages.items():
        damage()
        with pytest.raises(SourceError, match=f"00002-of-00004.safetensors: .*({said})"):
            LatentPairs(store)
    path.unlink()
    with pytest.raises(SourceError, match="1 of 4 shards are missing"):
        LatentPairs(store)


def test_damage_after_opening_costs_pairs(store, tmp_path):
    latents = LatentPairs(store)
    path = store / "00002-of-00004.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(PairError, match=r"00002-of-00004\.safetensors: Error while deserializing header"):
        latents[13]
    kept, other = path.read_bytes(), (store / "00001-of-00004.safetensors").read_bytes()
    path.write_bytes(other)
    with pytest.raises(PairError, match=r"00002-of-00004\.safetensors: it belongs to another store, or to another"):
        latents[13]
    path.write_bytes(kept)
    ledger = tmp_path / "bad.jsonl"
    loader = PairLoader(latents, 4, shuffle=False, ledger=ledger, last="pad", **LOADER)
    seen = {index for batch in loader for index in batch.index.tolist()}
    assert seen == set(range(20)) - set(BAD) - set(range(12, 18))
    lines = {line["index"]: line for line in read_ledger(ledger)}
    assert set(range(12, 18)) <= set(lines)
    assert lines[14]["position"] == f"{path}: row 2"
    with pytest.raises(LoaderError, match="in a row are bad"):
        list(PairLoader(latents, 4, shuffle=False, max_bad_run=2, max_bad_rate=1.0))


@pytest.mark.parametrize(
    "facts",
    [{}, {"blocks": [19], "categories": ["cat"]}, {"blocks": [-1, 21], "categories": ["cat"]}, {"blocks": [20]}],
)
def test_untrusted_indexes_are_refused(store, facts):
    index = store / "store.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "facts": facts}))
    with pytest.raises(SourceError, match="its index has other blocks or categories"):
        LatentPairs(store)


def test_whether_a_store_is_complete(store, tmp_path):
    """Of either kind. An index that is none is said to be, in the words of a store that is opened."""
    index = json.loads((store / "store.json").read_text())
    assert not is_complete(tmp_path / "nothing")
    assert is_complete(store)
    for kind in (None, 5, ["latents 1"]):
        (store / "store.json").write_text(json.dumps({**index, "kind": kind}))
        with pytest.raises(SourceError, match=r"store\.json: it does not have what it should$"):
            is_complete(store)
    (store / "store.json").write_text(json.dumps({**index, "kind": "reference errors 1"}))
    assert is_complete(store)
    (store / "00001-of-00004.safetensors").unlink()
    assert not is_complete(store)


def test_untrusted_records_are_bad_pairs(store):
    path = store / "00000-of-00004.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}  # no mapping of what is overwritten
    for row, text in enumerate([b"[" * 50, b"{}", b'{"key": "a", "prompt": "b", "extra": 3}']):
        tensors["text:record"][row] = 0
        tensors["text:record"][row, : len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    tensors["category"][4] = 77
    save_file(tensors, path, metadata)
    latents = LatentPairs(store)
    for index in (0, 1, 2, 4):
        with pytest.raises(PairError, match=f"00000-of-00004.safetensors: row {index}: its record is damaged"):
            latents[index]
    assert latents[5].key == "k5"
    with pytest.raises(SourceError, match="a category has a number beyond 1"):
        _ = latents.categories


def test_errors_ahead_of_time_over_latents(tmp_path, store):
    model, _, _, scheduler = build("sd15")
    latents = LatentPairs(store)

    def ready(batch):
        return {"latents": batch.pixels, "encoder_hidden_states": batch.extra["encoder_hidden_states"]}

    objective = PairObjective(scheduler, reference=model)
    for name, loader, encode in (
        ("ours", PairLoader(latents, 4, **LOADER), ready),
        ("theirs", images(), encoder(TinyVae())),
    ):
        precompute_reference_errors(loader, objective, encode, tmp_path / name, draws=1)
    index = torch.tensor([i for i in range(20) if i not in BAD])
    ours, theirs = (ReferenceErrors(tmp_path / name) for name in ("ours", "theirs"))
    assert torch.equal(ours(index, 0), theirs(index, 0))
    ours.check(source=PairLoader(LatentPairs(store), 2))
    with pytest.raises(ValueError, match="another source: in the store it is latents:"):
        ours.check(source=images())


def test_what_encode_may_not_return(tmp_path):
    words, latents = torch.zeros(4, 5, 12), torch.zeros(8, 4, 8, 8)
    for returned, said in (
        ({"text": words}, "encode returned text; expected latents among them"),
        ({"latents": latents[:4]}, r"encode returned latents of shape \(4, 4, 8, 8\); expected a tensor of 8 rows"),
        (
            {"latents": latents, "text": latents},
            r"encode returned text of shape \(8, 4, 8, 8\); expected a tensor of 4",
        ),
        ({"latents": latents, "added": {"text": words}}, "encode returned added dict; expected a tensor of 4 rows"),
        ({"latents": latents, "number": words}, "encode returned number, which is a column of the source"),
    ):
        with pytest.raises(ValueError, match=said):
            cache_latents(images(), lambda batch, returned=returned: returned, tmp_path / "bad", parts={})
    lengths = iter(range(5, 30))
    with pytest.raises(ValueError, match=r"extra.text is torch.float32 \(6, 12\) for a pair; expected .* \(5, 12\)"):
        cache_latents(
            images(), lambda batch: {"latents": latents, "text": torch.zeros(4, next(lengths), 12)}, tmp_path, parts={}
        )
    # Before hours are spent on shards that cannot be read together.
    given = lambda dtype: lambda batch: {"latents": latents.to(dtype)}  # noqa: E731
    cache_latents(images(), given(torch.float32), tmp_path / "two", parts={}, shard_pairs=8)
    (tmp_path / "two" / "00001-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match=r"latents is \('F16', .* for a pair; in the other shards it is \('F32'"):
        cache_latents(images(), given(torch.float16), tmp_path / "two", parts={}, shard_pairs=8)


def test_loaders_of_latents_take_no_decoding(store):
    latents = LatentPairs(store)
    with pytest.raises(TypeError, match="size, crop: no argument of PairLoader; the source needs no decoding"):
        PairLoader(latents, 2, size=2, crop="center")
    with pytest.raises(
        ValueError, match=r"prompt_dropout is 0\.1; expected 0, because the source has encoder_hidden_states"
    ):
        PairLoader(latents, 2, prompt_dropout=0.1)
    with pytest.raises(IndexError, match="pair 20 of 20"):
        latents[20]
    batch = next(iter(PairLoader(latents, 2, device="meta", **LOADER)))
    assert batch.pixels.is_meta
    assert batch.extra["encoder_hidden_states"].is_meta
    assert next(iter(PairLoader(latents, 2, **LOADER))).to("meta").extra["encoder_hidden_states"].is_meta
