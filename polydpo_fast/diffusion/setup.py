"""What a training and the making of its stores begin with: processes, pipeline, size, objective."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from ..data import PairLoader, Source, open_source
from .config import Settings, beta_of, common
from .extras import need
from .families import Family, check_geometry, family_of, native_size
from .latent_store import LatentPairs
from .noising import is_flow_matching
from .objective import PairObjective
from .pipelines import change_scheduler, load_pipeline, load_scheduler, training_scheduler
from .sharding import check_sharding, set_sharding
from .shards import is_store
from .together import check_same, together

__all__ = [
    "Setup",
    "accelerator_of",
    "check_writable",
    "expect_steps",
    "inductor_as_before",
    "new_accelerator",
    "objective_of",
    "set_up",
    "validation_source",
]

# A launcher waits for the other nodes, and then starts the processes of all of them at once.
_TO_JOIN = timedelta(minutes=15)
# Processes wait for each other where one downloads a model, or has more to encode or to render than another, and NCCL's
# own patience is ten minutes.
_PATIENCE = timedelta(hours=6)
# In a training, where one writes a checkpoint, or compiles: of a node that has lost its power the others learn nothing.
_PATIENCE_IN_STEPS = timedelta(hours=1)


class Setup(NamedTuple):
    """source: of images, or latents. size: height and width of the pixels. precision: the dtype of half precision, or
    float32 where there is none.
    """

    accelerator: Any
    source: Source
    pipe: Any
    family: Family
    size: tuple[int, int]
    precision: torch.dtype


def set_up(settings: Settings, accelerator: Any, *, weights: bool = True, training: bool = False) -> Setup:
    """The pipeline is still on the CPU; without weights, the part that is trained is on the meta device.

    accelerator: what `accelerator_of` made of the settings. training: whether the model learns, by a loss.

    Raises ValueError for settings that do not fit the model.
    """
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    policy = half if settings.lora_rank else torch.float32
    # Before the model is loaded, which takes long: what is wrong is said at once.
    with together(accelerator):
        source = _open("data", settings.data, settings.data_options)
        _check_loader(settings, source, accelerator)
        family = family_of(settings.model, settings.revision)
        alone = SimpleNamespace(scheduler=load_scheduler(settings.model, settings.revision))
        change_scheduler(alone, settings.scheduler)
        objective_of(settings, alone)
        if training and settings.beta is None and is_flow_matching(training_scheduler(alone)):
            raise ValueError(
                "beta is not given, and none was published for models that flow matching trains; expected a number, "
                "such as 100 for SD3.5, 1000 for FLUX or 500 for Wan, from where you look for a better one"
            )
    for first in (True, False):  # the main process, which may download
        with together(accelerator):
            if accelerator.is_main_process == first:
                pipe = load_pipeline(
                    settings.model,
                    policy=policy if weights else None,
                    frozen=half,
                    scheduler=settings.scheduler,
                    variant=settings.variant,
                    revision=settings.revision,
                )
    with together(accelerator):  # the files of a model may be others on another node
        model = getattr(pipe, family.model)
        if settings.guidance is not None and not model.config.get("guidance_embeds"):
            raise ValueError(
                f"guidance is {settings.guidance}, and this {type(model).__name__} has no guidance embedding, as "
                "FLUX.1-dev's has; expected none"
            )
        if settings.size_conditioning != "fixed" and not family.told_sizes:
            raise ValueError(
                f"size_conditioning is {settings.size_conditioning!r}, and a {type(pipe).__name__} is told no sizes, "
                "as SDXL's is; expected 'fixed'"
            )
        size = (settings.size, settings.size) if isinstance(settings.size, int) else settings.size
        height, width = size or native_size(pipe, family)
        check_geometry(pipe, family, (height, width), settings.loader.get("frames"))
    return Setup(accelerator, source, pipe, family, (height, width), half)


@contextlib.contextmanager
def inductor_as_before() -> Iterator[None]:
    """What `accelerator_of` changes of torch.compile's configuration is for this training alone."""
    import torch._inductor.config as inductor  # before it is changed: variables of the environment have a say in it

    before = {name: getattr(inductor, name) for name in ("emulate_precision_casts", "layout_optimization")}
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(inductor, name, value)


def new_accelerator(**options: Any) -> Any:
    """Accelerate's, whose processes wait for each other for hours once all are there. Makes Diffusers and Transformers
    quiet, too.

    Raises TimeoutError where some do not come.
    """
    import diffusers
    import transformers
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

    # Else they tell of every prompt that is longer than 77 tokens, and of image processors that nothing here uses.
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    # Else DDP has the gradient twice: as it is, and as it is summed.
    once = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    # Else a process of NCCL's goes on without the others, and waits for them in its first exchange, for ever.
    os.environ.setdefault("TORCH_DIST_INIT_BARRIER", "1")
    try:
        accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=_TO_JOIN), once], **options)
    except torch.distributed.DistError as error:
        raise TimeoutError(
            f"not all processes have found each other, for which they have {_TO_JOIN} (hours:minutes:seconds); "
            "expected those of all nodes, which may have said what is wrong there, and a network that lets them "
            f"through, to a port that is free: {error}"
        ) from error
    _be_patient(_PATIENCE)
    return accelerator


def expect_steps() -> None:
    """From here on processes wait for each other no longer than a step of a training may take."""
    _be_patient(_PATIENCE_IN_STEPS)


def _be_patient(time: timedelta) -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.distributed_c10d._set_pg_timeout(time)


def objective_of(settings: Settings, pipe: Any, **options: Any) -> PairObjective:
    return PairObjective(
        training_scheduler(pipe),
        alpha=settings.alpha,
        beta=beta_of(settings),
        objective=settings.objective,
        reduction="none",
        **options,
        **settings.loss,
    )


def validation_source(settings: Settings) -> Source | None:
    """The pairs of `validation_data`. Raises ValueError where nothing could encode them."""
    if settings.validation_data is None:
        return None
    source = _open("validation_data", settings.validation_data, settings.data_options)
    if any(map(is_store, _listed(settings.data))) and not isinstance(source, LatentPairs):
        raise ValueError(
            f"validation_data is {settings.validation_data!r}, and data {settings.data!r}, whose latents need no "
            "encoders in memory; expected latents too, made by `polydpo-fast cache` with the same settings"
        )
    return source


def _open(name: str, where: str | list[str], options: dict[str, Any]) -> Source:
    data = _listed(where)
    stores = [one for one in data if is_store(one)]
    if stores and len(data) > 1:
        raise ValueError(
            f"{name} is {data}; expected one folder of latents and nothing else, as {', '.join(stores)} "
            f"{'are such folders' if stores[1:] else 'is such a folder'}"
        )
    return LatentPairs(stores[0]) if stores else open_source(where, **options)


def _listed(where: str | list[str]) -> list[str]:
    return [where] if isinstance(where, str) else where


def _check_loader(settings: Settings, source: Source, accelerator: Any) -> None:
    """Raises ValueError or TypeError for what `Inputs` could not make a loader of."""
    processes = accelerator.num_processes
    if 0 < len(source) < settings.batch_size * processes:
        raise ValueError(
            f"batch_size is {settings.batch_size}, in each of {processes} processes, and data has only {len(source)} "
            "pairs; expected a smaller batch_size, or more pairs"
        )
    if not isinstance(source, LatentPairs):
        PairLoader(source, settings.batch_size, size=64, device=accelerator.device, **settings.loader)


def check_writable(name: str, folder: str | os.PathLike[str]) -> None:
    """Raises ValueError where there could be no such folder. name: of the setting."""
    path = Path(folder).expanduser()
    there = next(one for one in (path, *path.absolute().parents) if one.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(
            f"{name} is {str(folder)!r}, and {there} is no folder that can be written to; expected another"
        )


def accelerator_of(settings: Settings) -> Any:
    """Accelerate's, for a training or the making of its stores.

    Raises ValueError for what it does not do, and where processes were told different settings; ImportError.
    """
    need("accelerate", "transformers", "diffusers", "safetensors", *(["peft"] if settings.lora_rank else []))
    from accelerate.tracking import LoggerType, get_available_trackers
    from accelerate.utils import DynamoBackend, ProjectConfiguration, set_seed

    known = sorted({*map(str, LoggerType)} - {"all"})  # members of an Enum, which equal no text
    for name in settings.trackers:
        if name not in known:
            raise ValueError(f"trackers has {name!r}; expected some of {', '.join(known)}")
        if name not in map(str, get_available_trackers()):
            raise ImportError(f"trackers has {name!r}, which is not installed: pip install {name}")
    accelerator = new_accelerator(
        gradient_accumulation_steps=settings.accumulation,
        mixed_precision=settings.mixed_precision,
        log_with=settings.trackers or None,
        project_config=ProjectConfiguration(project_dir=settings.output, logging_dir=f"{settings.output}/logs"),
    )
    check_same(accelerator, {**common(settings), "mixed_precision": accelerator.mixed_precision})
    with together(accelerator):
        if accelerator.gradient_accumulation_steps != settings.accumulation:
            raise ValueError(
                f"accumulation is {settings.accumulation}, but ACCELERATE_GRADIENT_ACCUMULATION_STEPS in the "
                f"environment makes it {accelerator.gradient_accumulation_steps}; expected the same, or the variable "
                "not to be set"
            )
        if accelerator.mixed_precision == "fp16" and accelerator.scaler is None and accelerator.device.type == "cpu":
            raise ValueError("mixed_precision is 'fp16', which Accelerate has on GPUs only; expected 'bf16' or 'no'")
        check_sharding(settings, accelerator)
        set_sharding(settings, accelerator)
    if accelerator.state.dynamo_plugin.backend == DynamoBackend.INDUCTOR:
        import torch._inductor.config as inductor

        if accelerator.mixed_precision != "no":
            # Else it rounds where it happens to write to memory, which in a graph with gradients, the policy's, is
            # elsewhere than in the reference's: with a beta of thousands the first loss would be far from log 2.
            inductor.emulate_precision_casts = True
        if accelerator.device.type == "cpu":
            # With its channels last PyTorch 2.13 loses the gradients of all that comes before a UNet's upsampling.
            inductor.layout_optimization = False
    set_seed(settings.seed % 2**32)  # NumPy takes no more
    return accelerator
