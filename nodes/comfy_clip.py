"""The CLIP: ComfyUI's own tokenizer and post-processing around a language model in the workers."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import comfy.hooks
import comfy.model_management
import comfy.sd
import torch
from comfy.sd1_clip import SDClipModel
from comfy.text_encoders.qwen_vl import process_qwen2vl_images
from torch import Tensor, nn

from ..parallel_backend.families import VisionImage
from ..parallel_backend.loading.pipeline_folder import PipelineFolder
from ..parallel_backend.loading.text_encoder_file import TextEncoderFile
from .comfy_patcher import RemotePart, RemotePatcher, meta_state_dict
from .graph_nodes import this_node
from .group import check_interrupted
from .remote_modules import RemoteModule, add_modules, refuse_reach

OPTION = "parallel_text_encoder"
"""Among ComfyUI's model options: the `TextModelSpec` that `RemoteClipModel` is made of."""
MEDIA = ("image", "images", "image_embeds", "video", "audio")
"""What nodes hand a tokenizer beside the prompt; ComfyUI's drop what they do not know."""


@dataclass(frozen=True)
class TextModelSpec:
    """What ComfyUI's handling of tokens has to know of a language model in the workers.

    Args:
        part: what it is in the workers.
        count: how many layers the language model has.
        shapes: the weights that patches may name, under ComfyUI's keys.
        layer: ``"last"`` where the context is the last hidden state, or those that stand side by side in it.
        special_tokens: as ComfyUI's class of the family states them.
        image_token: placeholder for a part of an image; None: the language model does not look at images.
        gives_mask: whether the conditioning says which of its rows are padding.
    """

    part: RemotePart
    count: int
    shapes: Mapping[str, tuple[int, ...]]
    layer: str | list[int]
    special_tokens: Mapping[str, int]
    image_token: int | None = None
    gives_mask: bool = True


class PromptOnly:
    """Beside one of ComfyUI's tokenizers: refuses what it would drop without a word."""

    accepted_media: tuple[str, ...] = ()
    """What of `MEDIA` the tokenizer takes."""

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **options: Any) -> dict[str, list]:
        """As ComfyUI's; ValueError where there is more than it takes."""
        refused = [name for name in MEDIA if name not in self.accepted_media]
        given = [name for name in refused if options.get(name) is not None and len(options[name])]
        if given:
            raise ValueError(
                f"{this_node()} gives the text encoder in the parallel workers {', '.join(given)}, but it takes "
                f"{' and '.join(('a prompt', *self.accepted_media))} alone. Disconnect that input; for a reference "
                "image use ReferenceLatent"
            )
        return super().tokenize_with_weights(text, return_word_ids=return_word_ids, **options)  # type: ignore[misc]


class RemoteTextModel(RemoteModule):
    """Stands where ComfyUI's language model stands, without weights: the "embeddings" of tokens are their ids."""

    label = "the text encoder"

    def __init__(self, spec: TextModelSpec) -> None:
        super().__init__()
        self.spec, self.num_layers = spec, spec.count
        add_modules(self, spec.shapes, torch.float32)
        self._sealed = True

    def get_input_embeddings(self) -> _Ids:
        return _Ids()

    def preprocess_embed(self, embed: dict[str, Any], device: Any) -> tuple[Tensor, VisionImage]:
        """Placeholder ids ``[N, 1]`` that stand for an image among the tokens, and what the workers make of them."""
        assert self.spec.image_token is not None
        image = vision_image(embed["data"])
        count = image.patches.shape[0] // 4  # a token has two by two patches
        return torch.full((count, 1), float(self.spec.image_token), device=device), image

    def state_dict(self, *args, destination=None, prefix="", keep_vars=False):
        return meta_state_dict(self.spec.shapes, destination, prefix)

    def forward(
        self, _: None, attention_mask: Tensor, embeds: Tensor, embeds_info: list[dict[str, Any]], **__: Any
    ) -> tuple[Tensor | None, Tensor | None]:
        """As ComfyUI calls it, with ids ``[B, L, 1]``, a mask ``[B, L]``, and the images in the order of their ids.

        Returns:
            The last hidden state ``[B, L, D]``, or the chosen ones ``[B, layers, L, D]``; the other is None.
        """
        ids = embeds[..., 0].round().long()
        images = [info["extra"] for info in embeds_info if info["type"] == "image"]
        part = self.spec.part
        context = part.handle.get("text_encoder").encode_text(
            ids, attention_mask.long(), images, check=check_interrupted, adapters=part.adapters
        )
        if isinstance(self.spec.layer, str):
            return context, None
        return None, context.unflatten(-1, (len(self.spec.layer), -1)).movedim(2, 1)


class _Ids:
    """An embedding table that gives ids back; fp32 holds each exactly."""

    weight = torch.empty(0)
    """Where ComfyUI looks for the device, where it was not told one."""

    def __call__(self, ids: Tensor, out_dtype: torch.dtype) -> Tensor:
        return ids.unsqueeze(-1).to(out_dtype)


class RemoteClipModel(SDClipModel):
    """ComfyUI's handling of tokens and masks around `RemoteTextModel`."""

    def __init__(self, device: Any, dtype: Any, model_options: dict[str, Any]) -> None:
        spec: TextModelSpec = model_options[OPTION]
        super().__init__(
            device=device, dtype=dtype, layer=spec.layer, textmodel_json_config={},
            model_class=lambda *_: RemoteTextModel(spec), special_tokens=dict(spec.special_tokens),
            layer_norm_hidden_state=False, enable_attention_masks=True, return_attention_masks=spec.gives_mask,
        )  # fmt: skip
        del self.logit_scale  # nothing that could be moved or patched stays

    def process_tokens(self, tokens: list[list[Any]], device: Any) -> Any:
        """As ComfyUI's, but with the images of all texts; ValueError where a token is neither an id nor an image."""
        images = self.transformer.spec.image_token is not None
        for token in (token for section in tokens for token in section):
            if not (isinstance(token, numbers.Integral) or (images and _is_image(token))):
                raise ValueError(
                    f"the prompt of {this_node()} has an embedding (or an image) in it, which the text encoder in the "
                    "parallel workers does not take; remove 'embedding:...' from the prompt"
                )
        # One text at a time: of several, ComfyUI would keep the images of the last one alone.
        parts = [super(RemoteClipModel, self).process_tokens([section], device) for section in tokens]
        lengths = sorted({part[0].shape[1] for part in parts})
        if len(lengths) > 1:
            raise ValueError(
                f"{this_node()} encodes texts of {' and '.join(map(str, lengths))} tokens (with their images) in one "
                "batch; use a node that encodes them one by one"
            )
        counts, infos = ([entry for part in parts for entry in part[index]] for index in (2, 3))
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts]), counts, infos


class RemoteEncoder:
    """Beside ComfyUI's class of a family's text encoder, which keeps everything but the language model.

    Args:
        spec: of the language model.
        name: what ComfyUI's class calls it.
    """

    def __init__(self, spec: TextModelSpec, name: str) -> None:
        # ComfyUI takes another class for its language model by this name.
        options = {OPTION: spec, f"{name}_class": RemoteClipModel}
        super().__init__(dtype=torch.float32, model_options=options)  # type: ignore[call-arg]
        self.remote_part = spec.part

    def set_clip_options(self, options: dict[str, Any]) -> None:
        refuse_clip_layer(options.get("layer"))
        super().set_clip_options(options)  # type: ignore[misc]

    def load_state_dict(self, *_: Any, **__: Any) -> None:
        refuse_reach("the text encoder")

    def generate(self, *_: Any, **__: Any) -> None:
        refuse_generation()


def vision_image(picture: Tensor) -> VisionImage:
    """What a vision tower of the Qwen2-VL kind gets of IMAGE ``[B, H, W, 3]``, of which it sees the first.

    Raises:
        ValueError: the picture has another number of channels.
    """
    if picture.shape[-1] != 3:
        raise ValueError(
            f"an image for the text encoder, of {this_node()}, has {picture.shape[-1]} channels where 3 are expected; "
            "remove its alpha channel (Split Image with Alpha)"
        )
    patches, grid = process_qwen2vl_images(picture)
    frames, rows, columns = grid[0].tolist()
    return VisionImage(patches.float(), (frames, rows, columns))


def _is_image(token: Any) -> bool:
    return isinstance(token, dict) and token.get("type") == "image"


class RemoteCLIP(comfy.sd.CLIP):
    """ComfyUI's CLIP object, which nodes clone before they change it."""

    def clone(self, *args: Any, **kwargs: Any) -> RemoteCLIP:
        clone = super().clone(*args, **kwargs)
        clone.__class__ = RemoteCLIP
        return clone

    def __deepcopy__(self, memo: dict[int, Any]) -> RemoteCLIP:
        return self.clone()  # the weights are not here

    def clip_layer(self, layer_idx: int) -> None:
        refuse_clip_layer(layer_idx)

    def load_sd(self, *_: Any, **__: Any) -> None:
        refuse_reach("the text encoder")

    def get_sd(self) -> dict[str, Any]:
        return self.patcher.get_key_patches()  # refuses


def refuse_clip_layer(layer: int | None) -> None:
    """Raise ValueError where a node chooses the text encoder's layer."""
    if layer is not None:
        raise ValueError(
            f"{this_node()} asks for layer {layer} of the text encoder, as CLIP Set Last Layer does, but in the "
            "parallel workers its layers are fixed; bypass the node that chooses it"
        )


def refuse_generation() -> NoReturn:
    """Raise ValueError for nodes that have the text encoder write."""
    raise ValueError(
        f"{this_node()} asks for text, but the text encoder in the parallel workers only encodes, it cannot generate "
        "text; use ComfyUI's own Load CLIP"
    )


def weight_shapes(source: TextEncoderFile | PipelineFolder) -> dict[str, tuple[int, ...]]:
    """The weights under ComfyUI's names, and their shapes: those that a LoRA may name."""
    kind = source.family.needs_text_encoder()
    names: dict[str, Callable[[str], str]] = {"text_encoder": kind.patch_name, "vision_tower": "visual.{}".format}
    return {
        named(name): weight.shape
        for component, named in names.items()
        if component in source.components
        for name, weight in source.weights(component).items()
    }


def wrap_clip(text_encoder: nn.Module, tokenizer: Any) -> comfy.sd.CLIP:
    """ComfyUI's CLIP object around a text encoder without parameters."""
    clip = RemoteCLIP(no_init=True)
    clip.cond_stage_model = text_encoder
    clip.tokenizer = tokenizer
    clip.patcher = RemotePatcher(
        clip.cond_stage_model,
        comfy.model_management.text_encoder_device(),
        comfy.model_management.text_encoder_offload_device(),
    )
    clip.patcher.hook_mode = comfy.hooks.EnumHookMode.MinVram
    clip.patcher.is_clip = True
    clip.apply_hooks_to_conds = None
    clip.layer_idx = None
    clip.use_clip_schedule = False
    clip.tokenizer_options = {}
    return clip
