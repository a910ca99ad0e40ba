"""`DaliDecoder` on a GPU, and its pipelines there."""

import pytest
import torch
from image_oracle import jpeg, picture

pytest.importorskip("polydpo_fast._C", reason="the C++ extension is not built")
from data.dali_cases import assert_same_facts, needs_dali, oriented

from polydpo_fast import decode_clips, decode_pairs
from polydpo_fast.data.dali import clips as dali_clips
from polydpo_fast.data.dali import images as dali_images
from polydpo_fast.data.dali.decoder import DaliDecoder
from polydpo_fast.data.dali.engine import Engine


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
