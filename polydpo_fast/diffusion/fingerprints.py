"""What a store was made with, as short texts that can be compared later."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..data import PairLoader, Source
from ..data.formats.fields import parse_json
from .config import of_pairs
from .reference import base_model, switched_off, unwrapped

__all__ = ["alternatives", "as_told_now", "fingerprint", "parts_of", "random_options"]

_SAMPLES = 1024  # numbers of each tensor
_SENTENCE = "Cats'  35mm \u00e9e\u0301"
# Of a model's configuration, what says nothing of its outputs: the dtype is that of its weights.
_NOT_OUTPUTS = {"architectures", "dtype", "torch_dtype", "transformers_version"}


def fingerprint(part: Any) -> str:
    """Of a model, a tokenizer, a scheduler, a source, or anything that JSON can tell; a text is its own.

    A model's is its class and 128 bits of SHA-256 over its configuration, as Diffusers and Transformers keep it, and
    its parameters and persistent buffers in order of name: of each the name, dtype, shape, and the bytes of 1024
    elements at equal distances (all, where there are no more). So it notices any training, but not a change of a few
    single weights. Adapters of PEFT that are switched off do not count. It is the same on any device and within DDP and
    torch.compile; it is to be taken before FSDP shards a model.

    A tokenizer's, of Transformers, is a digest of its vocabulary, its longest input, and what it makes of a sentence.
    A scheduler's is its class and a digest of its configuration, without what begins with an underscore.
    """
    if isinstance(part, str):
        return part
    if isinstance(part, torch.dtype):
        return str(part).removeprefix("torch.")
    if isinstance(part, torch.nn.Module):
        return _of_weights(part)
    if isinstance(part, Source):
        return part.fingerprint
    if hasattr(part, "get_vocab"):
        told = [sorted(part.get_vocab().items()), part.model_max_length, part(_SENTENCE).input_ids]
        return f"tokenizer:{hashlib.sha256(_json(told).encode()).hexdigest()[:32]}"
    config = getattr(part, "config", None)
    if config is not None:
        settings = _json(_public(dict(config)))
        return f"{type(part).__name__}:{hashlib.sha256(settings.encode()).hexdigest()[:32]}"
    return _json(part)


def as_told_now(earlier: Mapping[str, Any]) -> dict[str, Any]:
    """What a store or a checkpoint was made with, where an earlier version may have written it.

    What had no name when there was no choice was so; and of the data's options those were told that are places.
    """
    told = {"size_conditioning": "own", **earlier}
    options = told.get("data_options")
    if isinstance(options, Mapping):
        told["data_options"] = of_pairs(options)
    elif isinstance(options, str):
        with contextlib.suppress(ValueError):  # not all stores are the commands'
            told["data_options"] = fingerprint(of_pairs(parse_json(options.encode())))
    return told


def alternatives(part: Any) -> Iterator[str]:
    """The fingerprint; of a policy that trains adapters also that without them, which is its reference's."""
    yield fingerprint(part)
    if isinstance(part, torch.nn.Module) and any(hasattr(module, "base_layer") for module in unwrapped(part).modules()):
        with switched_off(part):
            yield fingerprint(part)


def parts_of(pairs: PairLoader | Source | None) -> dict[str, Any]:
    """What a store depends on where it is made of these pairs: their source and, of a loader, its transform too."""
    if isinstance(pairs, PairLoader):
        return {"source": pairs.source, "transform": pairs.transform}
    return {} if pairs is None else {"source": pairs}


def random_options(loader: PairLoader) -> str:
    """Those of its decoding that are drawn for each pair; empty where there are none."""
    options = loader.transform
    return ", ".join(
        f"{name}={options[name]!r}"
        for name, drawn in (("crop", "random"), ("start", "random"), ("hflip", None))
        if (options.get(name) == drawn if drawn else options.get(name, 0) > 0)
    )


def _of_weights(model: torch.nn.Module) -> str:
    inner = base_model(model)
    off = [
        f"{name}." if name else ""
        for name, module in inner.named_modules()
        if hasattr(module, "base_layer") and getattr(module, "disable_adapters", False)
    ]
    tensors: dict[str, Tensor] = {}
    for name, tensor in inner.state_dict().items():
        if not isinstance(tensor, Tensor):
            continue
        for prefix in off:
            if name.startswith(prefix):
                rest = name[len(prefix) :]
                name = prefix + rest.removeprefix("base_layer.") if rest.startswith("base_layer.") else ""
        if name:
            tensors[name] = tensor
    digest = hashlib.sha256(_configuration(inner).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        count = tensor.numel()
        if count:
            at = torch.arange(min(count, _SAMPLES), device=tensor.device) * count // min(count, _SAMPLES)
            digest.update(tensor.reshape(-1)[at].cpu().view(torch.uint8).numpy().tobytes())
    return f"{type(inner).__name__}:{digest.hexdigest()[:32]}"


def _configuration(model: torch.nn.Module) -> str:
    """What the weights do not tell, such as the number of heads, or a VAE's scaling factor; "" where there is nothing.

    Without what is as by default, so that a release of Diffusers or Transformers that knows more changes nothing.
    """
    config: Any = getattr(model, "config", None)
    if callable(getattr(config, "to_dict", None)):
        try:
            usual = type(config)().to_dict()
        except (TypeError, ValueError):  # a kind that has none without arguments
            usual = {}
        config = config.to_dict()
    else:
        usual = {name: one.default for name, one in inspect.signature(type(model).__init__).parameters.items()}
    if not isinstance(config, Mapping):
        return ""
    told = _outputs(config)
    return _json({name: told[name] for name in told if name not in usual or _json(told[name]) != _json(usual[name])})


def _outputs(config: Mapping[Any, Any]) -> dict[str, Any]:
    """Also of the parts that a configuration has within."""
    return {
        name: _outputs(value) if isinstance(value, Mapping) else value
        for name, value in _public(config).items()
        if name not in _NOT_OUTPUTS
    }


def _public(config: Mapping[Any, Any]) -> dict[str, Any]:
    return {str(name): value for name, value in config.items() if not str(name).startswith("_")}


def _json(value: Any) -> str:
    return json.dumps(value, default=repr, sort_keys=True)
