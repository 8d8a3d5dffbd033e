"""Load Checkpoint (Parallel): MODEL and CLIP in the workers, and ComfyUI's own VAE, from one file."""

from __future__ import annotations

import logging
from dataclasses import replace

import comfy.sd
import folder_paths
import torch
from comfy_api.latest import io

from ..parallel_backend.config import ParallelismConfig
from ..parallel_backend.loading.all_in_one import TEXT_ENCODERS, VAE, AllInOne, open_all_in_one, text_encoder_names
from ..parallel_backend.loading.checkpoint import open_checkpoint
from ..parallel_backend.loading.safetensors_reader import read_metadata
from ..parallel_backend.loading.single_file import SingleFile, file_fingerprint
from ..parallel_backend.loading.text_encoder_file import TextEncoderFile
from ..parallel_backend.runtime.client.launcher import prepare
from .comfy_model import make_model
from .families import family_of
from .group import ModelHandle
from .layout import ALIASES, CATEGORY, Layout
from .loaders import (
    AS_STORED,
    WEIGHT_DTYPES,
    checked,
    encoder_memory_input,
    layout_input,
    load,
    weight_dtype_input,
)
from .model_paths import CHECKPOINT_FILES, file_names, find_file
from .states import HIDDEN, Place, show, state_of

log = logging.getLogger(__name__)

TEXT_ENCODER = "text_encoder"
SMALL = 2**16
"""Bytes of a tensor that ComfyUI may look into to find out what a checkpoint is; of others it looks at the shapes."""


class LoadCheckpoint(io.ComfyNode):
    """Stands where Load Checkpoint stands: transformer and text encoder of the file in the workers."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HybridDiT_LoadCheckpoint",
            display_name="Load Checkpoint (Parallel)",
            category=CATEGORY,
            description=(
                "Loads an all-in-one checkpoint from models/checkpoints: its diffusion model and text encoder into "
                "worker processes, split as the layout says, its VAE into ComfyUI. Takes the place of Load Checkpoint; "
                "the rest of the graph stays as it is."
            ),
            search_aliases=["checkpoint loader", "all in one", "aio", "multi gpu checkpoint", *ALIASES],
            inputs=[
                io.Combo.Input(
                    "ckpt_name",
                    options=file_names(CHECKPOINT_FILES),
                    tooltip="A .safetensors file under models/checkpoints with a FLUX.2, Qwen-Image or Qwen-Image-Edit "
                    "in it, as ComfyUI's Save Checkpoint writes it.",
                ),
                layout_input(),
                weight_dtype_input(
                    "'default': fp8, int8 and other quantized weights stay so, and the GPU multiplies those of the "
                    "diffusion model as they are where it has units for that and the file is made for it; others are "
                    "bfloat16 on GPUs and float32 on the CPU. 'as storage': they stay, and are multiplied in bfloat16."
                ),
                encoder_memory_input(),
            ],
            hidden=HIDDEN,
            outputs=[
                io.Model.Output("MODEL", tooltip="For samplers and guiders. Its evaluations run in the workers."),
                io.Clip.Output(
                    "CLIP", tooltip="For CLIPTextEncode and the like. The text encoder is split over all workers."
                ),
                io.Vae.Output("VAE", tooltip="ComfyUI's own, for VAEDecode and VAEEncode."),
            ],
        )

    @classmethod
    def validate_inputs(cls, ckpt_name=None):
        return checked(ckpt_name, lambda name: _check(open_all_in_one(find_file(CHECKPOINT_FILES, name))))

    @classmethod
    def fingerprint_inputs(cls, ckpt_name=None, **_):
        return file_fingerprint(find_file(CHECKPOINT_FILES, ckpt_name)) if ckpt_name is not None else ""

    @classmethod
    def execute(
        cls,
        ckpt_name: str,
        layout: Layout | None = None,
        weight_dtype: str = AS_STORED,
        encoder_memory: str = "auto",
    ) -> io.NodeOutput:
        place, (dtype, fp8) = Place.of(cls.hidden), WEIGHT_DTYPES[weight_dtype]
        found = open_all_in_one(find_file(CHECKPOINT_FILES, ckpt_name))
        text = open_checkpoint(found.path, TEXT_ENCODER) if found.text_prefix else None
        if text is not None:
            prepare(text)
        handle, source = load(place, lambda: found.path, layout, dtype, fp8)
        assert isinstance(source, SingleFile)
        model, clip = make_model(handle, source), None
        if isinstance(text, TextEncoderFile):
            fp8 = "stored" if fp8 == "matmul" else fp8  # as ComfyUI multiplies text encoders
            # On the same ranks, also where they were chosen for the transformer.
            config = replace(handle.config, part=TEXT_ENCODER, fp8=fp8, encoder_memory=encoder_memory)
            text_handle = ModelHandle(config)
            show(place, lambda: f"{state_of(handle.config)}\ntext encoder {state_of(config)}")
            text_handle.get()
            clip = family_of(text).clip_of_file(text_handle, text)
        elif found.keys(TEXT_ENCODERS):
            clip = own_clip(found)
        return io.NodeOutput(model, clip, own_vae(found))


def _check(found: AllInOne) -> None:
    """Raise ValueError for a checkpoint of which a part cannot be loaded."""
    found.transformer.check(ParallelismConfig())
    if found.text_prefix:
        open_checkpoint(found.path, TEXT_ENCODER)


def own_vae(found: AllInOne) -> comfy.sd.VAE:
    """ComfyUI's own VAE of a checkpoint; where there is none, one that says so when it is used, as from its own loader.

    Raises:
        ValueError: ComfyUI does not know it.
    """
    tensors = {key.removeprefix(VAE): tensor for key, tensor in found.read(found.keys(VAE)).items()}
    vae = comfy.sd.VAE(sd=tensors, metadata=read_metadata(found.path))
    if tensors and vae.first_stage_model is None:
        raise ValueError(f"{VAE}* in {found.path} is no VAE that ComfyUI knows; take the VAE from a file of its own")
    return vae


def own_clip(found: AllInOne) -> comfy.sd.CLIP:
    """ComfyUI's own CLIP of text encoders that the workers do not know, as its own loader makes it.

    Raises:
        ValueError: ComfyUI does not know it either.
    """
    names = " and ".join(text_encoder_names(found.stored))
    log.info("the workers do not know the text encoder %s of %s: ComfyUI runs it", names, found.path.name)
    large = [key for key in found.keys(found.prefix) if found.stored[key].nbytes > SMALL]
    # Only the shapes of the diffusion model, from which ComfyUI sees what it is.
    tensors = {key: torch.empty(found.stored[key].shape, device="meta") for key in large}
    tensors |= found.read(key for key in found.stored if key not in tensors and not key.startswith(VAE))
    _, clip, *_ = comfy.sd.load_state_dict_guess_config(
        tensors, output_vae=False, output_model=False, metadata=read_metadata(found.path),
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
    )  # fmt: skip
    if clip is None:
        raise ValueError(f"{TEXT_ENCODERS}* in {found.path} is no text encoder that ComfyUI knows for this model")
    return clip
