"""The reference's errors ahead of time, against those of a reference that is asked in each step."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from data.pairs import Tiny
from diffusers import DDPMScheduler
from diffusion.encoding import TinyVae, encoder
from diffusion.pipelines import vae
from diffusion.runs import stored
from diffusion.tiny import build, unet
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from splitmix import chained
from transformers import CLIPTextConfig, CLIPTextModel

from polydpo_fast.data import PairLoader, SourceError
from polydpo_fast.diffusion import (
    PairObjective,
    ReferenceErrors,
    adapters_off,
    fingerprint,
    precompute_reference_errors,
)
from polydpo_fast.diffusion.fingerprints import random_options

PIXELS = dict(size=2, dtype=torch.uint8, max_bad_rate=1.0)
BETA = 500.0
MAKE = dict(draws=2, seed=7, shard_pairs=4)


def perturbed(model):
    torch.manual_seed(1)
    policy = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return policy


def loader(pairs=10, batch_size=2, source=None, **options):
    return PairLoader(source or Tiny(pairs), batch_size, **{**PIXELS, **options})


@pytest.fixture(scope="module")
def sd15():
    model, _, _, scheduler = build("sd15")
    return model, scheduler, encoder(TinyVae())


@pytest.fixture
def store(tmp_path, sd15):
    """Of ten pairs, pair 3 is bad; in three shards."""
    model, scheduler, encode = sd15
    source = Tiny(10, {3: "win"})
    objective = PairObjective(scheduler, reference=model)
    precompute_reference_errors(loader(source=source), objective, encode, tmp_path, parts={"vae": TinyVae()}, **MAKE)
    return tmp_path


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_losses_are_those_of_a_reference_that_is_asked(tmp_path, family):
    reference, _, _, scheduler = build(family)
    policy, encode = perturbed(reference), encoder(TinyVae(), pooled=family == "sd3")
    online = PairObjective(scheduler, reference=reference, beta=BETA, reduction="none", density="logit_normal")
    ahead = PairObjective(scheduler, beta=BETA, reduction="none", density="logit_normal")
    pairs = Tiny(10, {3: "win", 8: "read"})
    precompute_reference_errors(loader(source=pairs, batch_size=3), online, encode, tmp_path, **MAKE)
    errors = ReferenceErrors(tmp_path)
    training = loader(source=pairs, batch_size=4, last="pad", seed=5)
    errors.check(model=reference, objective=ahead, source=training)
    assert len(errors) == 10
    seen, apart = {}, []
    for epoch in range(3):
        draw = epoch % errors.draws
        for batch in training:
            latents = encode(batch)
            conditioning = {name: value for name, value in latents.items() if name != "latents"}
            call = dict(seeds=errors.seeds(batch.index, draw))
            ours, _ = ahead(policy, latents["latents"], conditioning, ref_error=errors(batch.index, draw), **call)
            want, metrics = online(policy, latents["latents"], conditioning, **call)
            # The difference of two nearly equal errors, each within float32's rounding in batches of another size.
            tolerance = BETA * 1e-7 * max(1.0, metrics["ref_mse_win"].item(), metrics["ref_mse_lose"].item())
            torch.testing.assert_close(ours[batch.ok], want[batch.ok], rtol=0, atol=tolerance)
            apart.append(((want[batch.ok] - torch.tensor(2.0).log()).abs().max() / tolerance).item())
            for index, seed in zip(batch.index.tolist(), call["seeds"], strict=True):
                seen.setdefault(index, []).append(seed)
    assert max(apart) > 50  # there is something to compare
    assert {len(set(found)) for index, found in seen.items() if index >= 0} == {2}
    assert not {3, 8} & set(seen)


@pytest.mark.parametrize("world_size", [2, 3])
def test_any_number_of_ranks_makes_the_same(tmp_path, store, sd15, world_size):
    model, scheduler, encode = sd15
    folder = tmp_path / "ranks"
    for rank in range(world_size):
        one = loader(source=Tiny(10, {3: "win"}), rank=rank, world_size=world_size)
        objective = PairObjective(scheduler, reference=model)
        precompute_reference_errors(one, objective, encode, folder, parts={"vae": TinyVae()}, **MAKE)
        if rank < world_size - 1:
            with pytest.raises(SourceError, match=r"is incomplete: \d of 3 shards are missing .*-of-00003.safetensors"):
                ReferenceErrors(folder)
    assert stored(folder) == stored(store)
    assert torch.isnan(load_file(store / "00000-of-00003.safetensors")["errors"]).flatten(1).any(1).tolist() == [
        False, False, False, True
    ]  # fmt: skip


@pytest.mark.parametrize("calls", [1, 4])
def test_what_was_interrupted_goes_on(tmp_path, store, sd15, calls):
    model, scheduler, encode = sd15
    folder, made = tmp_path / "again", []

    def interrupted(batch):
        made.append(batch.index.tolist())
        if len(made) == calls + 2:  # the first batch is encoded twice
            raise KeyboardInterrupt
        return encode(batch)

    def make(encode):
        one = loader(source=Tiny(10, {3: "win"}))
        objective = PairObjective(scheduler, reference=model)
        precompute_reference_errors(one, objective, encode, folder, parts={"vae": TinyVae()}, **MAKE)

    with pytest.raises(KeyboardInterrupt):
        make(interrupted)
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("0*")}
    assert len(before) == calls // 2
    make(encode)
    assert {name: (folder / name).stat().st_mtime_ns for name in before} == before
    assert stored(folder) == stored(store)
    assert {path.name for path in folder.iterdir()} == {*stored(store), "store.json"}


def test_of_other_things_they_are_refused(store, sd15):
    model, scheduler, encode = sd15
    errors = ReferenceErrors(store)
    training = loader(source=Tiny(10, {3: "win"}))
    errors.check(model=model, scheduler=scheduler, source=training, objective=PairObjective(scheduler), vae=TinyVae())
    errors.check(model=torch.compile(model), source=training.source)
    other_schedule = DDPMScheduler(beta_start=0.001)
    others = {
        "model": (perturbed(model), fingerprint(model)),
        "scheduler": (other_schedule, fingerprint(scheduler)),
        "source": (loader(11), "tiny:10:0"),
        "vae": (TinyVae(1), fingerprint(TinyVae())),
    }
    for name, (other, had) in others.items():
        got = fingerprint(other.source if name == "source" else other)
        with pytest.raises(
            ValueError, match=f"was made with another {name}: in the store it is {had}, here it is {got}"
        ):
            errors.check(**{name: other})
    with pytest.raises(ValueError, match=r"another transform: in the store it is \{.*bilinear.*here it is .*bicubic"):
        errors.check(source=loader(source=Tiny(10), interpolation="bicubic"))
    with pytest.raises(ValueError, match=f"another scheduler: in the store it is {fingerprint(scheduler)}, here it is"):
        errors.check(objective=PairObjective(other_schedule))
    with pytest.raises(ValueError, match=r"another timesteps: .*uniform.*here it is .*logit_normal"):
        errors.check(objective=PairObjective(scheduler, density="logit_normal"))
    with pytest.raises(
        ValueError, match="does not say with what text_encoder it was made; it does of model, scheduler"
    ):
        errors.check(text_encoder=TinyVae())

    def go_on(source=training.source, model=model, scheduler=scheduler, pixels=None, **change):
        objective = PairObjective(scheduler, reference=model)
        options = {**MAKE, "parts": {"vae": TinyVae()}, **change}
        precompute_reference_errors(loader(source=source, **(pixels or {})), objective, encode, store, **options)

    go_on()
    for name, change in {
        "model": dict(model=perturbed(model)),
        "scheduler": dict(scheduler=other_schedule),
        "source": dict(source=Tiny(10, version=1)),
        "transform": dict(pixels=dict(interpolation="bicubic")),
        "seed": dict(seed=8),
        "draws": dict(draws=3),
        "vae": dict(parts={"vae": TinyVae(1)}),
    }.items():
        with pytest.raises(ValueError, match=f"was made with another {name}: in the store it is .*, here it is "):
            go_on(**change)
    with pytest.raises(ValueError, match=r"shard_pairs is 5; .* was begun with 4"):
        go_on(shard_pairs=5)
    with pytest.raises(ValueError, match=r"was begun with vae TinyVae:.*; expected it again"):
        go_on(parts={})


def test_fingerprints_of_models():
    model, *_ = build("sd15")
    text = fingerprint(model)
    assert text.startswith("UNet2DConditionModel:")
    assert fingerprint(copy.deepcopy(model)) == fingerprint(torch.compile(model)) == text
    assert fingerprint(copy.deepcopy(model).to(memory_format=torch.channels_last)) == text
    assert fingerprint(copy.deepcopy(model).bfloat16()) != text
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.conv_out.bias[0] += 1e-6
    assert fingerprint(changed) != text
    lora = copy.deepcopy(model)
    lora.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights="gaussian"))
    assert fingerprint(lora) != text
    with adapters_off(lora):
        assert fingerprint(lora) == text


def test_fingerprints_tell_configurations():
    """What the weights do not tell: the number of heads, a VAE's scale, a text encoder's activation."""
    model, latents, conditioning, scheduler = build("sd15")
    other = unet(attention_head_dim=2)
    other.load_state_dict(model.state_dict())
    errors = [
        PairObjective(scheduler, reference=one.eval()).reference_errors(None, latents, conditioning, seeds=[1, 2])
        for one in (model, other)
    ]
    assert not torch.equal(*errors)
    assert fingerprint(model) != fingerprint(other)
    assert fingerprint(get_peft_model(copy.deepcopy(other), LoraConfig(target_modules=["to_q"]))) != fingerprint(other)
    policy = get_peft_model(copy.deepcopy(other), LoraConfig(target_modules=["to_q"]))
    with adapters_off(policy):
        assert fingerprint(policy) == fingerprint(torch.compile(policy)) == fingerprint(other)

    one = vae()
    text = fingerprint(one)
    for name, value in dict(_name_or_path="elsewhere", _diffusers_version="99", torch_dtype="float16").items():
        one.register_to_config(**{name: value})
        assert fingerprint(one) == text
    one.register_to_config(scaling_factor=0.9)
    assert fingerprint(one) != text

    small = dict(vocab_size=10, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    clip = CLIPTextModel(CLIPTextConfig(**small))
    text = fingerprint(clip)
    clip.config.transformers_version, clip.config.architectures, clip.config.name_or_path = "9.9", ["X"], "elsewhere"
    assert fingerprint(clip) == text
    clip.config.hidden_act = "gelu"
    assert fingerprint(clip) != text
    assert fingerprint(torch.nn.Linear(2, 2)).startswith("Linear:")  # has none


def test_fingerprints_of_large_weights_are_of_places_all_over():
    """1024 of 4096, at equal distances: any training is noticed, a single weight between them is not."""
    one = torch.nn.Linear(64, 64, bias=False)
    text = fingerprint(one)
    for place, noticed in ((0, True), (4, True), (4092, True), (1, False), (4095, False)):
        other = copy.deepcopy(one)
        with torch.no_grad():
            other.weight.view(-1)[place] += 1
        assert (fingerprint(other) != text) == noticed, place


def test_fingerprints_of_tokenizers():
    """Another word, another place of a word, a longer text, or another way to cut a sentence, is another."""

    def tokenizer(vocabulary, longest=77, cut=str.split):
        class Tokenizer:
            model_max_length = longest

            def get_vocab(self):
                return dict(vocabulary)

            def __call__(self, sentence):
                return SimpleNamespace(input_ids=[len(word) for word in cut(sentence)])

        return fingerprint(Tokenizer())

    words = {"a": 0, "b": 1}
    assert tokenizer(words) == tokenizer(reversed(words.items()))
    others = (
        tokenizer({**words, "c": 2}),
        tokenizer({"a": 1, "b": 0}),
        tokenizer(words, longest=64),
        tokenizer(words, cut=lambda sentence: sentence.split(" ")),
    )
    assert len({tokenizer(words), *others}) == 5


def test_a_release_that_knows_more_changes_no_fingerprint():
    """By default a model is what it was when there was no such choice."""

    class Model(torch.nn.Linear):
        def __init__(self, **config):
            super().__init__(2, 2)
            torch.nn.init.ones_(self.weight)
            torch.nn.init.ones_(self.bias)
            self.config = config

    class Newer(Model):
        def __init__(self, norm=(1, 2), **config):
            super().__init__(norm=norm, **config)

    old = fingerprint(Model(heads=[2]))
    Newer.__name__ = "Model"
    assert fingerprint(Newer(heads=(2,))) == fingerprint(Newer(heads=[2], norm=[1, 2])) == old
    assert fingerprint(Newer(heads=[2], norm=(1, 3))) != old


def test_adapters_switched_off_are_a_reference(tmp_path, sd15):
    model, scheduler, encode = sd15
    lora = copy.deepcopy(model)
    lora.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    for folder, policy, reference in (("lora", lora, adapters_off), ("copy", None, model)):
        objective = PairObjective(scheduler, reference=reference)
        precompute_reference_errors(loader(4), objective, encode, tmp_path / folder, model=policy, **MAKE)
        ReferenceErrors(tmp_path / folder).check(model=model)
        ReferenceErrors(tmp_path / folder).check(model=lora)
    assert stored(tmp_path / "lora") == stored(tmp_path / "copy")
    lora.conv_out.bias.data += 1
    with pytest.raises(ValueError, match="another model"):
        ReferenceErrors(tmp_path / "lora").check(model=lora)


def test_pairs_without_errors_are_named(store):
    errors = ReferenceErrors(store)
    found = errors(torch.tensor([1, -1, 9]), 1)
    assert found.dtype == torch.float64
    assert found.shape == (6,)
    assert found[[1, 4]].tolist() == [0, 0]
    want = load_file(store / "00000-of-00003.safetensors")["errors"][1, 1]
    assert torch.equal(found[[0, 3]], want)
    shard = store / "00000-of-00003.safetensors"
    with pytest.raises(ValueError, match=rf"pair 3 has no errors: .* could not be read or decoded; remove {shard} and"):
        errors(torch.tensor([2, 3]), 0)
    with pytest.raises(IndexError, match="pair 10 of 10"):
        errors(torch.tensor([10]), 0)
    with pytest.raises(IndexError, match="pair -2 of 10"):
        errors(torch.tensor([-2]), 0)
    for draw in (2, -1):
        with pytest.raises(ValueError, match=f"draw is {draw}; expected 0 to 1, such as batch.lap % draws"):
            errors(torch.tensor([1]), draw)
    with pytest.raises(ValueError, match=r"draw has shape \(1,\); expected that of index, \(2,\), or an int"):
        errors(torch.tensor([1, 2]), torch.tensor([1]))


def test_pairs_may_be_in_draws_of_their_own(store):
    index, draw = torch.tensor([9, 1, -1, 0, 9]), torch.tensor([1, 0, 0, 1, 0])
    errors = ReferenceErrors(store)
    alone = [ReferenceErrors(store)(index[i : i + 1], int(draw[i])) for i in range(5)]
    assert torch.equal(errors(index, draw), torch.stack(alone, 1).flatten())
    assert errors.seeds(index, draw) == [errors.seeds(index, draw_)[i] for i, draw_ in enumerate(draw.tolist())]
    # Those of stores that are there already: of the seed, the draw and the pair.
    assert errors.seeds(index, draw)[:2] == [chained(MAKE["seed"], 1, 9), chained(MAKE["seed"], 0, 1)]


def damage(path, how):
    data = path.read_bytes()
    if how == "truncated":
        path.write_bytes(data[:-5])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "header":
        path.write_bytes(b"\xff" * 8 + data[8:])
    elif how == "another":
        path.write_bytes(path.with_name("00000-of-00003.safetensors").read_bytes())
    elif how == "unsigned":
        save_file(load_file(path), path)


@pytest.mark.parametrize("how", ["truncated", "empty", "header", "another", "unsigned"])
def test_damaged_shards_are_named(store, how):
    damage(store / "00001-of-00003.safetensors", how)
    with pytest.raises(SourceError, match=r"00001-of-00003.safetensors: "):
        ReferenceErrors(store)


@pytest.mark.parametrize(
    "change",
    [{"pairs": 10**15}, {"pairs": "10"}, {"shard_pairs": 0}, {"made_with": {"seed": 1}}, {"kind": "latents 1"}],
)
def test_untrusted_indexes_are_refused(store, change):
    index = store / "store.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), **change}))
    with pytest.raises(SourceError, match=r"store.json: it "):
        ReferenceErrors(store)
    index.write_text("[" * 10**5)
    with pytest.raises(SourceError, match=r"store.json: it is not JSON"):
        ReferenceErrors(store)
    index.unlink()
    with pytest.raises(SourceError, match="no store of reference errors 1 is there"):
        ReferenceErrors(store)


def test_what_would_differ_in_training_is_refused(tmp_path, sd15):
    model, scheduler, encode = sd15
    objective = PairObjective(scheduler, reference=model)
    for option, said in (
        (dict(crop="random"), "crop='random'"),
        (dict(hflip=0.5), "hflip=0.5"),
        (dict(prompt_dropout=0.1), "prompt_dropout=0.1"),
    ):
        with pytest.raises(ValueError, match=f"the loader has {said}; expected"):
            precompute_reference_errors(loader(**option), objective, encode, tmp_path)
    assert random_options(SimpleNamespace(transform={"start": "random", "hflip": 0, "frames": 5})) == "start='random'"

    def sampled(batch):
        return {**encode(batch), "latents": torch.randn(len(batch.pixels), 4, 8, 8)}

    with pytest.raises(ValueError, match="encode returned other latents when called again; expected a VAE's mean"):
        precompute_reference_errors(loader(), objective, sampled, tmp_path / "a")

    def overflown(batch):
        latents = encode(batch)["latents"]
        latents[batch.keys.index("k5") if "k5" in batch.keys else 0] *= torch.inf if "k5" in batch.keys else 1
        return {**encode(batch), "latents": latents}

    with pytest.raises(ValueError, match=r"the reference's errors of pair 'k5' are \[\[nan, "):
        precompute_reference_errors(loader(), objective, overflown, tmp_path / "b")
    with pytest.raises(ValueError, match="objective has no reference"):
        precompute_reference_errors(loader(), PairObjective(scheduler), encode, tmp_path)
    with pytest.raises(ValueError, match="model is None; expected the policy"):
        precompute_reference_errors(loader(), PairObjective(scheduler, reference=adapters_off), encode, tmp_path)
    with pytest.raises(ValueError, match="draws is 0; expected an int from 1"):
        precompute_reference_errors(loader(), objective, encode, tmp_path, draws=0)
    with pytest.raises(ValueError, match="shard_pairs is 0; expected an int >= 1"):
        precompute_reference_errors(loader(), objective, encode, tmp_path / "c", shard_pairs=0)
