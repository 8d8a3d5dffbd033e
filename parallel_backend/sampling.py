"""A picture over a worker group, step for step as diffusers' pipeline of the same class draws it in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .cache.config import CacheSettings
from .cache.run import CacheRun
from .families import Conditioning
from .families.drawing import Drawing
from .image_request import CompleteRequest, ImageRequest
from .loading.pipeline_folder import PipelineFolder
from .runtime.remote_model import RemoteModel

if TYPE_CHECKING:
    from diffusers import FlowMatchEulerDiscreteScheduler
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a pipeline folder."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(Path(folder) / "tokenizer", trust_remote_code=False)


def load_processor(folder: str | Path) -> Any:
    """The image processor of a pipeline folder.

    Raises:
        ValueError: there is none.
    """
    path = Path(folder) / "processor"
    if not (path / "preprocessor_config.json").is_file():
        raise ValueError(
            f"{path / 'preprocessor_config.json'} is missing, which reference images go through: the pipeline is "
            "incomplete; download it again"
        )
    from transformers import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(path, trust_remote_code=False)


def load_scheduler(folder: str | Path) -> FlowMatchEulerDiscreteScheduler:
    """The scheduler of a pipeline folder.

    Raises:
        ValueError: there is none.
    """
    path = Path(folder) / "scheduler"
    if not (path / "scheduler_config.json").is_file():
        raise ValueError(f"{path / 'scheduler_config.json'} is missing: the pipeline is incomplete; download it again")
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler.from_pretrained(path)


def check_request(source: PipelineFolder, request: ImageRequest) -> CompleteRequest:
    """A request with what suits the pipeline where it leaves something open. Nothing is started.

    Raises:
        ValueError: a request that cannot be drawn, or a folder that lacks what drawing it needs.
    """
    drawing = source.drawing
    complete = request.complete(drawing)
    load_scheduler(source.path)
    if complete.images and drawing.needs_processor:
        load_processor(source.path)
    return complete


def draw(
    model: RemoteModel,
    request: ImageRequest,
    on_step: Callable[[int, int], None] = lambda *_: None,
    cache: CacheSettings | None = None,
) -> Image.Image:
    """Draw one picture.

    Args:
        model: a pipeline in a worker group.
        request: what to draw.
        on_step: told the steps done and the steps in all.
        cache: of the transformer's blocks; None computes each step in full.

    Raises:
        ValueError: a request that cannot be drawn, or a model that is no whole pipeline.
    """
    source = model.source
    if not isinstance(source, PipelineFolder):
        raise ValueError(f"{source.path} is one model; drawing takes a pipeline folder (one with a model_index.json)")
    drawing, complete = source.drawing, check_request(source, request)
    streams = _conditionings(model, drawing, complete)
    latent = torch.randn(
        drawing.latent_shape(complete.width, complete.height),
        generator=torch.Generator().manual_seed(complete.seed),
        dtype=torch.float32,
    )
    scheduler = load_scheduler(source.path)
    multiple = source.family.pixel_multiple
    source.family.set_timesteps(scheduler, complete.steps, complete.width // multiple * (complete.height // multiple))
    run = None if cache is None else CacheRun(cache, steps=complete.steps)
    on_step(0, complete.steps)
    try:
        for index, timestep in enumerate(scheduler.timesteps):
            predictions = {}
            for stream, conditioning in streams.items():
                plan = None if run is None else (run, run.evaluation(stream, index))
                predictions[stream] = model.predict(latent, timestep.expand(1) / 1000, conditioning, cache=plan).float()
            prediction = predictions["cond"]
            if complete.cfg is not None and "uncond" in predictions:
                prediction = drawing.combine(prediction, predictions["uncond"], complete.cfg)
            latent = scheduler.step(prediction, timestep, latent, return_dict=False)[0]
            on_step(index + 1, complete.steps)
    finally:
        if run is not None:
            model.end_run(run)
    return to_picture(model.decode(latent))


def to_picture(image: Tensor) -> Image.Image:
    """The first image of ``[B, 3, H, W]`` (the first frame of ``[B, 3, F, H, W]``) in -1..1 as 8-bit RGB."""
    first = image[0] if image.ndim == 4 else image[0, :, 0]
    pixels = ((first.float() / 2 + 0.5).clamp(0, 1) * 255).round().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(pixels.astype(np.uint8))


def _conditionings(model: RemoteModel, drawing: Drawing, request: CompleteRequest) -> dict[str, Conditioning]:
    """What the evaluations of a step are conditioned on: "cond", and under true CFG "uncond"."""
    prompts = {"cond": request.prompt}
    if request.negative_prompt is not None:
        prompts["uncond"] = request.negative_prompt
    folder, images = model.source.path, request.images
    tokenizer, processor = load_tokenizer(folder), load_processor(folder) if drawing.needs_processor else None
    texts = {stream: drawing.tokenize(tokenizer, processor, prompt, images) for stream, prompt in prompts.items()}
    contexts = {stream: model.encode_text(text.ids, text.mask, text.images) for stream, text in texts.items()}
    references: Sequence[Tensor] = [model.encode(pixels) for pixels in drawing.reference_pixels(images)]
    return {
        stream: drawing.conditioning(contexts[stream], text, references, request.guidance)
        for stream, text in texts.items()
    }
