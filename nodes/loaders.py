"""The loaders: a diffusers pipeline folder as MODEL, CLIP and VAE, or files as MODEL and CLIP, all in the workers."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from comfy_api.latest import io

from ..parallel_backend.config import ParallelismConfig
from ..parallel_backend.drawing.demo_model import DEMO_FOLDER_NAME
from ..parallel_backend.families import FAMILIES
from ..parallel_backend.loading.checkpoint import Checkpoint, open_checkpoint
from ..parallel_backend.loading.pipeline_folder import PipelineFolder, open_pipeline_folder
from ..parallel_backend.loading.single_file import SingleFile, file_fingerprint, open_single_file
from ..parallel_backend.loading.text_encoder_file import TextEncoderFile, open_text_encoder_file
from ..parallel_backend.runtime.client.launcher import prepare
from ..parallel_backend.runtime.group_config import DTYPES, ENCODER_MEMORY, ModelConfig
from .comfy_model import make_model
from .comfy_vae import make_vae
from .families import COMFY_FAMILIES, family_of
from .group import ModelHandle
from .layout import ALIASES, CATEGORY, ChoiceText, Layout, LayoutSocket, LayoutWarning
from .model_paths import ENCODER_FILES, MODEL_FILES, file_names, find_file, find_pipeline, list_pipelines
from .states import HIDDEN, Place, no_text, show, state_of

log = logging.getLogger(__name__)

AS_STORED = "default"
"""ComfyUI's name for weights as their file has them."""
WEIGHT_DTYPES = {
    AS_STORED: ("auto", "matmul"),
    "as storage": ("auto", "stored"),
    **{dtype: (dtype, "cast") for dtype in DTYPES[1:]},
    "fp8 as storage": ("auto", "stored"),  # of workflows that were saved when there was no other
}
"""Choices of a loader of files, as dtype and use of quantized weights of `ModelConfig.create`."""


def _titles(pipelines: bool = False) -> list[str]:
    """What users may search for: families, or those whose pipeline folders are read."""
    found = [family for family in FAMILIES if family.pipeline_classes or not pipelines]
    return [f"{family.title.lower().replace('-', ' ')} parallel" for family in found]


class LoadPipeline(io.ComfyNode):
    """Starts the workers of a layout and loads a pipeline into them; with equal settings it finds them up already."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HybridDiT_LoadPipeline",
            display_name="Load Pipeline (Parallel)",
            category=CATEGORY,
            description=(
                "Loads a diffusers pipeline folder from models/diffusers into worker processes, split as the layout "
                "says. MODEL, CLIP and VAE go to the stock nodes."
            ),
            search_aliases=["diffusers loader", "multi gpu loader", *_titles(pipelines=True), *ALIASES],
            inputs=[
                io.Combo.Input(
                    "pipeline",
                    options=list_pipelines(),
                    default=DEMO_FOLDER_NAME,
                    tooltip="A folder with a model_index.json under models/diffusers, such as NAME or ORG/NAME, or a "
                    "model in the Hub's cache there: FLUX.2-dev, Qwen-Image or Qwen-Image-Edit. "
                    f"'{DEMO_FOLDER_NAME}' is a small FLUX.2 that comes along and draws shapes.",
                ),
                layout_input(),
                io.Combo.Input(
                    "dtype",
                    options=list(DTYPES),
                    default="auto",
                    optional=True,
                    advanced=True,
                    tooltip="Number format of the weights; 'auto' is bfloat16 on GPUs and float32 on the CPU.",
                ),
                encoder_memory_input(),
            ],
            hidden=HIDDEN,
            outputs=[
                io.Model.Output("MODEL", tooltip="For samplers and guiders. Its evaluations run in the workers."),
                io.Clip.Output(
                    "CLIP", tooltip="For CLIPTextEncode and the like. The text encoder is split over all workers."
                ),
                io.Vae.Output("VAE", tooltip="For VAEDecode and VAEEncode. It runs in the workers."),
            ],
        )

    @classmethod
    def validate_inputs(cls, pipeline=None):
        return checked(pipeline, lambda name: open_pipeline_folder(find_pipeline(name)).check(ParallelismConfig()))

    @classmethod
    def fingerprint_inputs(cls, pipeline=None, **_):
        # A folder that was replaced is loaded anew.
        return open_pipeline_folder(find_pipeline(pipeline)).fingerprint() if pipeline is not None else ""

    @classmethod
    def execute(
        cls, pipeline: str, layout: Layout | None = None, dtype: str = "auto", encoder_memory: str = "auto"
    ) -> io.NodeOutput:
        place = Place.of(cls.hidden)
        handle, source = load(place, lambda: find_pipeline(pipeline), layout, dtype, encoder_memory=encoder_memory)
        assert isinstance(source, PipelineFolder)
        return io.NodeOutput(
            make_model(handle, source), family_of(source).clip_of_folder(handle, source), make_vae(handle, source)
        )


class LoadDiffusionModel(io.ComfyNode):
    """Stands where Load Diffusion Model stands: the file's transformer in the workers, as MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HybridDiT_LoadDiffusionModel",
            display_name="Load Diffusion Model (Parallel)",
            category=CATEGORY,
            description=(
                "Loads a diffusion model file from models/diffusion_models into worker processes, split as the layout "
                "says. Takes the place of Load Diffusion Model; the rest of the graph stays as it is."
            ),
            search_aliases=["unet loader", "multi gpu unet", *_titles(), *ALIASES],
            inputs=[
                io.Combo.Input(
                    "unet_name",
                    options=file_names(MODEL_FILES),
                    tooltip="A .safetensors (or .sft) file under models/diffusion_models (or models/unet), such as "
                    "flux2_dev_fp8mixed.safetensors, flux-2-klein-4b.safetensors, qwen_image_bf16.safetensors, "
                    "z_image_turbo_bf16.safetensors or wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors.",
                ),
                layout_input(),
                weight_dtype_input(
                    "'default': fp8, int8 and other quantized weights stay so, and the GPU multiplies them as they are "
                    "where it has units for that and the file is made for it; others are bfloat16 on GPUs (Wan's "
                    "float16) and float32 on the CPU. 'as storage': they stay, and are multiplied in that. 'bfloat16': "
                    "made dense while they are loaded."
                ),
            ],
            hidden=HIDDEN,
            outputs=[io.Model.Output("MODEL", tooltip="For samplers and guiders. Its evaluations run in the workers.")],
        )

    @classmethod
    def validate_inputs(cls, unet_name=None):
        return checked(
            unet_name, lambda name: open_single_file(find_file(MODEL_FILES, name)).check(ParallelismConfig())
        )

    @classmethod
    def fingerprint_inputs(cls, unet_name=None, **_):
        return file_fingerprint(find_file(MODEL_FILES, unet_name)) if unet_name is not None else ""

    @classmethod
    def execute(cls, unet_name: str, layout: Layout | None = None, weight_dtype: str = AS_STORED) -> io.NodeOutput:
        place = Place.of(cls.hidden)
        handle, source = load(place, lambda: find_file(MODEL_FILES, unet_name), layout, *WEIGHT_DTYPES[weight_dtype])
        assert isinstance(source, SingleFile)
        return io.NodeOutput(make_model(handle, source))


class LoadCLIP(io.ComfyNode):
    """Stands where Load CLIP stands: the file's text encoder in the workers, as CLIP."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HybridDiT_LoadCLIP",
            display_name="Load CLIP (Parallel)",
            category=CATEGORY,
            description=(
                "Loads a text encoder file from models/text_encoders into worker processes, split over all of them. "
                "Takes the place of Load CLIP; with the same layout it shares the workers of Load Diffusion Model "
                "(Parallel)."
            ),
            search_aliases=[
                "clip loader",
                "text encoder loader",
                "multi gpu clip",
                "mistral parallel",
                "qwen parallel",
                "umt5 parallel",
                "wan clip parallel",
                *ALIASES,
            ],
            inputs=[
                io.Combo.Input(
                    "clip_name",
                    options=file_names(ENCODER_FILES),
                    tooltip="A .safetensors (or .sft) file under models/text_encoders (or models/clip), such as "
                    "mistral_3_small_flux2_bf16.safetensors, qwen_2.5_vl_7b.safetensors or umt5_xxl_fp16.safetensors.",
                ),
                io.Combo.Input(
                    "type",
                    options=[family.clip_type for family in COMFY_FAMILIES.values() if family.clip_type],
                    tooltip="The model family of the text encoder. ComfyUI's own Load CLIP loads those of Z-Image "
                    "and FLUX.2 klein.",
                ),
                layout_input(),
                weight_dtype_input(
                    "'default': fp8, nvfp4 and other quantized weights stay so and are multiplied in bfloat16, others "
                    "are bfloat16 on GPUs and float32 on the CPU."
                ),
                encoder_memory_input(),
            ],
            hidden=HIDDEN,
            outputs=[
                io.Clip.Output(
                    "CLIP", tooltip="For CLIPTextEncode and the like. The text encoder is split over all workers."
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, clip_name=None):
        # Not the type too: ComfyUI repeats what is wrong for each of the arguments here.
        return checked(clip_name, lambda name: open_text_encoder_file(find_file(ENCODER_FILES, name)))

    @classmethod
    def fingerprint_inputs(cls, clip_name=None, **_):
        return file_fingerprint(find_file(ENCODER_FILES, clip_name)) if clip_name is not None else ""

    @classmethod
    def execute(
        cls,
        clip_name: str,
        type: str,
        layout: Layout | None = None,
        weight_dtype: str = AS_STORED,
        encoder_memory: str = "auto",
    ) -> io.NodeOutput:
        dtype, fp8 = WEIGHT_DTYPES[weight_dtype]
        # ComfyUI, too, multiplies text encoders in the number format beside that of their weights.
        fp8 = "stored" if fp8 == "matmul" else fp8
        handle, source = load(
            Place.of(cls.hidden),
            lambda: find_file(ENCODER_FILES, clip_name),
            layout,
            dtype,
            fp8,
            encoder_memory,
            lambda source: check_type(source, type),
        )
        assert isinstance(source, TextEncoderFile)
        return io.NodeOutput(family_of(source).clip_of_file(handle, source))


def check_type(source: Checkpoint, type: str) -> None:
    """Raise ValueError if a text encoder's file is of another type than the one chosen."""
    found = family_of(source).clip_type
    if type != found:
        raise ValueError(
            f"{source.path.name} is the text encoder of {source.family.title}, but the type is {type!r}; choose the "
            f"type {found!r}, or another file"
        )


def checked(name: str | None, look: Callable[[str], object]) -> bool | str:
    """What ``validate_inputs`` answers for the name of a checkpoint: what is wrong with it, or True.

    Args:
        name: None where it is linked, and so not known yet.
        look: opens the checkpoint of a name; ValueError says what is wrong.
    """
    try:
        if name is not None:
            look(name)
    except ValueError as error:
        return str(error)
    return True


def weight_dtype_input(default: str) -> io.Input:
    """The number format of a file's weights; what its default does is said by the loader."""
    return io.Combo.Input(
        "weight_dtype",
        options=list(WEIGHT_DTYPES),
        default=AS_STORED,
        optional=True,
        advanced=True,
        tooltip=f"Number format in which the workers hold the weights. {default}",
    )


def layout_input() -> io.Input:
    """The layout socket of a loader."""
    tooltip = "From Parallel Layout. Without it one process holds the whole model."
    return LayoutSocket.Input("layout", optional=True, tooltip=tooltip)


def encoder_memory_input() -> io.Input:
    """Where a loader's text encoder stays between prompts."""
    return io.Combo.Input(
        "encoder_memory",
        options=list(ENCODER_MEMORY),
        default="auto",
        optional=True,
        advanced=True,
        tooltip="Where the text encoder stays between prompts: on its 'device', or in 'host' memory, from where it "
        "comes back for each new prompt. 'auto': on the device as long as a few GiB stay free there.",
    )


def load(
    place: Place,
    find: Callable[[], Path],
    layout: Layout | None,
    dtype: str,
    fp8: str = "cast",
    encoder_memory: str = "auto",
    check: Callable[[Checkpoint], None] = lambda _: None,
) -> tuple[ModelHandle, Checkpoint]:
    """Have the workers of a layout hold a checkpoint, and show on the loader how that model is from then on.

    Args:
        place: of the loader.
        find: the checkpoint.
        layout: None: one process.
        dtype, fp8, encoder_memory: see `ModelConfig.create`.
        check: raises ValueError for a checkpoint that the loader does not take, before workers start.
    """
    layout = layout or Layout(ParallelismConfig(), "auto")
    show(place, no_text)  # of an earlier run, until this one knows its model
    path = find()
    source = open_checkpoint(path)
    check(source)
    degrees, speed, devices, choice = layout.degrees, layout.speed, layout.devices, None
    prepare(source)  # beside what is imported and looked at here
    if layout.auto:
        from ..parallel_backend.planning.auto_layout import choose_for_checkpoint  # with the compiler: a second

        choice = choose_for_checkpoint(source, layout.devices, dtype, fp8)
        log.info("Parallel Layout, automatic: %s%s", choice.reason, f"\n{choice.table()}" if choice.options else "")
        degrees, speed = choice.layout, replace(speed, copy_engines=speed.copy_engines or choice.copies)
        devices = choice.devices or devices
    config = ModelConfig.create(path, degrees, devices, dtype, fp8, encoder_memory, layout.hosts, speed)
    if layout.node and "transformer" in source.components:  # a text encoder of its own has little to do with the choice
        warning = LayoutWarning(source, layout, dtype, fp8) if choice is None else None
        show(Place(place.graph, layout.node), warning or ChoiceText(choice, config))
    show(place, lambda: state_of(config))
    handle = ModelHandle(config)
    return handle, handle.get().source
