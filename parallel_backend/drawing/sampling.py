"""A picture over a worker group, step for step as diffusers' pipeline of the same class draws it in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..cache.config import CacheSettings
from ..cache.run import CacheRun
from ..families import Conditioning, Family
from ..families.drawing import Drawing
from ..loading.adapters import NO_ADAPTERS, AdapterSet
from ..loading.checkpoint import Checkpoint
from ..loading.pipeline_folder import PipelineFolder
from ..loading.single_file import SingleFile
from ..loading.text_encoder_file import TextEncoderFile
from ..loading.vae_file import VaeFile
from ..runtime.client.remote_model import RemoteModel
from .image_request import CompleteRequest, ImageRequest

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


@dataclass(frozen=True)
class Models:
    """What draws: a pipeline folder's model, or three models of single files.

    Args:
        drawing: how.
        transformer, text_encoder, vae: which may be one.
        tokenizer, processor: of text and images; the processor may be None.
        scheduler: of the steps.
    """

    drawing: Drawing
    transformer: RemoteModel
    text_encoder: RemoteModel
    vae: RemoteModel
    tokenizer: PreTrainedTokenizerBase
    processor: Any
    scheduler: FlowMatchEulerDiscreteScheduler

    @classmethod
    def of_folder(cls, model: RemoteModel) -> Models:
        """All of a pipeline; ValueError for a model that is none."""
        source = model.source
        if not isinstance(source, PipelineFolder):
            raise ValueError(
                f"{source.path} is one model; drawing takes a pipeline folder (one with a model_index.json)"
            )
        folder, drawing = source.path, source.drawing
        processor = load_processor(folder) if drawing.needs_processor else None
        return cls(drawing, model, model, model, load_tokenizer(folder), processor, load_scheduler(folder))

    @classmethod
    def of_files(cls, transformer: RemoteModel, text_encoder: RemoteModel, vae: RemoteModel) -> Models:
        """Models of files that `drawing_of_files` has looked at."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        assert isinstance(text_encoder.source, TextEncoderFile)
        drawing = drawing_of_files(transformer.source, text_encoder.source, vae.source)
        tokenizer = drawing.file_tokenizer(text_encoder.source.read_tokenizer())
        scheduler = FlowMatchEulerDiscreteScheduler(**(drawing.scheduler or {}))
        return cls(drawing, transformer, text_encoder, vae, tokenizer, None, scheduler)


def drawing_of_files(transformer: Checkpoint, text_encoder: Checkpoint, vae: Checkpoint) -> Drawing:
    """How the models of three files draw together.

    Raises:
        ValueError: a file that is another part, of another family, or of one whose files do not say enough.
    """
    family = transformer.family
    for source, kind, what in (
        (transformer, SingleFile, "a transformer"),
        (text_encoder, TextEncoderFile, "a text encoder"),
        (vae, VaeFile, "a VAE"),
    ):
        if not isinstance(source, kind):
            raise ValueError(f"{source.path} is not {what} in one file")
        if source.family is not family:
            raise ValueError(
                f"{source.path} is {what} of {source.family.title}, but {transformer.path} is of {family.title}"
            )
    drawing = files_drawing(family, transformer.path)
    assert isinstance(transformer, SingleFile)
    assert isinstance(text_encoder, TextEncoderFile)
    takes = family.transformer.context_width(transformer.transformer_config)
    layers = family.needs_text_encoder().layers(text_encoder.text_config)
    gives = len(layers) * text_encoder.text_config["text_config"]["hidden_size"]
    if takes != gives:
        raise ValueError(
            f"{transformer.path} takes {takes} features of a token, and {text_encoder.path} gives {gives}: it is for "
            "another text encoder (FLUX.2 klein is for Qwen3); draw with it in ComfyUI, whose own Load CLIP loads that"
        )
    return drawing


def files_drawing(family: Family, path: Path) -> Drawing:
    """How models of a family's files draw; ValueError for a family whose files do not say enough."""
    if not family.pipeline_classes:
        why = "of which the workers hold the transformer alone" if family.text_encoder is None else "which makes videos"
        raise ValueError(f"{path} is of {family.title}, {why}: draw with it in ComfyUI")
    drawing = family.drawing(family.pipeline_classes[0])
    if drawing.scheduler is None:
        raise ValueError(
            f"{path} is of {family.title}, whose files come without their tokenizer, which ComfyUI has: draw with them "
            "in ComfyUI, or take the diffusers folder"
        )
    return drawing


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
    models: RemoteModel | Models,
    request: ImageRequest,
    on_step: Callable[[int, int], None] = lambda *_: None,
    cache: CacheSettings | None = None,
    adapters: AdapterSet = NO_ADAPTERS,
) -> Image.Image:
    """Draw one picture.

    Args:
        models: a pipeline in a worker group, or its parts.
        request: what to draw.
        on_step: told the steps done and the steps in all.
        cache: of the transformer's blocks; None computes each step in full.
        adapters: patches of the transformer's weights (LoRA), as `lora_file.read_loras` gives them.

    Raises:
        ValueError: a request that cannot be drawn, or a model that is no whole pipeline.
    """
    if not isinstance(models, Models):
        models = Models.of_folder(models)
    drawing, complete = models.drawing, request.complete(models.drawing)
    kind, source = drawing.transformer, models.transformer.source
    assert not isinstance(source, TextEncoderFile | VaeFile)
    streams = _conditionings(models, complete)
    latent = torch.randn(
        kind.latent_shape(source.transformer_config, complete.width, complete.height),
        generator=torch.Generator().manual_seed(complete.seed),
        dtype=torch.float32,
    )
    tokens = complete.width // kind.pixel_multiple * (complete.height // kind.pixel_multiple)
    drawing.set_timesteps(models.scheduler, complete.steps, tokens)
    run = None if cache is None else CacheRun(cache, steps=complete.steps)
    on_step(0, complete.steps)
    try:
        for index, timestep in enumerate(models.scheduler.timesteps):
            predictions = {}
            for stream, conditioning in streams.items():
                plan = None if run is None else (run, run.evaluation(stream, index))
                predicted = models.transformer.predict(
                    latent, timestep.expand(1) / 1000, conditioning, cache=plan, adapters=adapters
                )
                predictions[stream] = predicted.float()
            prediction = predictions["cond"]
            if complete.cfg is not None and "uncond" in predictions:
                prediction = drawing.combine(prediction, predictions["uncond"], complete.cfg)
            latent = models.scheduler.step(prediction, timestep, latent, return_dict=False)[0]
            on_step(index + 1, complete.steps)
    finally:
        if run is not None:
            models.transformer.end_run(run)
    return to_picture(models.vae.decode(latent))


def to_picture(image: Tensor) -> Image.Image:
    """The first image of ``[B, 3, H, W]`` (the first frame of ``[B, 3, F, H, W]``) in -1..1 as 8-bit RGB."""
    first = image[0] if image.ndim == 4 else image[0, :, 0]
    pixels = ((first.float() / 2 + 0.5).clamp(0, 1) * 255).round().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(pixels.astype(np.uint8))


def _conditionings(models: Models, request: CompleteRequest) -> dict[str, Conditioning]:
    """What the evaluations of a step are conditioned on: "cond", and under true CFG "uncond"."""
    prompts = {"cond": request.prompt}
    if request.negative_prompt is not None:
        prompts["uncond"] = request.negative_prompt
    drawing, images = models.drawing, request.images
    texts = {s: drawing.tokenize(models.tokenizer, models.processor, prompt, images) for s, prompt in prompts.items()}
    encode = models.text_encoder.encode_text
    contexts = {stream: encode(text.ids, text.mask, text.images) for stream, text in texts.items()}
    references: Sequence[Tensor] = [models.vae.encode(pixels) for pixels in drawing.reference_pixels(images)]
    return {
        stream: drawing.conditioning(contexts[stream], text, references, request.guidance)
        for stream, text in texts.items()
    }
