"""The CLIP of a text encoder file: ComfyUI's own tokenizer and post-processing around a model in the workers."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import Any

import comfy.sd
import folder_paths
import torch
from comfy.sd1_clip import SDClipModel
from comfy.text_encoders.flux import Flux2TEModel, Flux2Tokenizer
from torch import Tensor, nn

from ..parallel_backend.loading.text_encoder_file import TextEncoderFile
from .comfy_clip import refuse_clip_layer, refuse_generation, wrap_clip
from .comfy_patcher import RemotePart, meta_state_dict
from .group import ModelHandle, check_interrupted

OPTION = "parallel_text_encoder"
"""Among ComfyUI's model options: what `RemoteClipModel` is made of."""
MEDIA = ("image", "images", "image_embeds", "video", "audio")
"""What nodes hand a tokenizer beside the prompt, which FLUX.2's would drop."""


class PromptTokenizer(Flux2Tokenizer):
    """ComfyUI's tokenizer of FLUX.2, which refuses what it would drop without a word."""

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **options: Any) -> dict[str, list]:
        """As ComfyUI's; ValueError where there is more than a prompt."""
        given = [name for name in MEDIA if options.get(name) is not None and len(options[name])]
        if given:
            raise ValueError(
                f"the text encoder in the parallel workers takes a prompt alone; it was given {', '.join(given)} too. "
                "Disconnect that input; for a reference image use ReferenceLatent"
            )
        return super().tokenize_with_weights(text, return_word_ids=return_word_ids, **options)


class RemoteTextModel(nn.Module):
    """Stands where ComfyUI's language model stands, without parameters: the "embeddings" of tokens are their ids.

    Args:
        handle: of the model in the workers.
        layers: how many layers the file has.
        shapes: the weights that patches may name, under ComfyUI's keys, and their shapes.
    """

    def __init__(self, handle: ModelHandle, layers: int, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.handle, self.num_layers, self._shapes = handle, layers, shapes

    def get_input_embeddings(self) -> _Ids:
        return _Ids()

    def state_dict(self, *args, destination=None, prefix="", keep_vars=False):
        return meta_state_dict(self._shapes, destination, prefix)

    def forward(
        self, _: None, attention_mask: Tensor, embeds: Tensor, intermediate_output: list[int], **__: Any
    ) -> tuple[None, Tensor]:
        """Hidden states ``[B, layers, L, D]`` of ids ``[B, L, 1]`` and a mask ``[B, L]``, as ComfyUI calls it."""
        ids = embeds[..., 0].round().long()
        context = self.handle.get().encode_text(ids, attention_mask.long(), check=check_interrupted)
        return None, context.unflatten(-1, (len(intermediate_output), -1)).movedim(2, 1)


class _Ids:
    """An embedding table that gives ids back; fp32 holds each exactly."""

    weight = torch.empty(0)
    """Where ComfyUI looks for the device, where it was not told one."""

    def __call__(self, ids: Tensor, out_dtype: torch.dtype) -> Tensor:
        return ids.unsqueeze(-1).to(out_dtype)


class RemoteClipModel(SDClipModel):
    """ComfyUI's handling of tokens and masks around `RemoteTextModel`."""

    def __init__(self, device: Any, dtype: Any, model_options: dict[str, Any]) -> None:
        handle, layers, count, shapes = model_options[OPTION]
        super().__init__(
            device=device, dtype=dtype, layer=list(layers), textmodel_json_config={},
            model_class=lambda *_: RemoteTextModel(handle, count, shapes), special_tokens={"start": 1, "pad": 0},
            layer_norm_hidden_state=False, enable_attention_masks=True, return_attention_masks=True,
        )  # fmt: skip
        del self.logit_scale  # nothing that could be moved or patched stays

    def process_tokens(self, tokens: list[list[Any]], device: Any) -> Any:
        """As ComfyUI's; ValueError where a token is no id."""
        if not all(isinstance(token, numbers.Integral) for section in tokens for token in section):
            raise ValueError(
                "the prompt has an embedding (or an image) in it, which the text encoder in the parallel workers does "
                "not take; remove 'embedding:...' from the prompt"
            )
        return super().process_tokens(tokens, device)


class RemoteFlux2TE(Flux2TEModel):
    """ComfyUI's text encoder of FLUX.2 with everything but the language model."""

    def __init__(self, handle: ModelHandle, source: TextEncoderFile) -> None:
        layers = source.family.text_layers(source.text_config)
        count = source.text_config["text_config"]["num_hidden_layers"]
        shapes = {f"model.{name}": weight.shape for name, weight in source.text_weights.items()}
        options = {OPTION: (handle, layers, count, shapes)}
        super().__init__(dtype=torch.float32, model_options=options, clip_model=RemoteClipModel)
        self.remote_part = RemotePart(handle, "text_encoder")

    def set_clip_options(self, options: dict[str, Any]) -> None:
        refuse_clip_layer(options)
        super().set_clip_options(options)

    def generate(self, *_: Any, **__: Any) -> None:
        refuse_generation()


def make_clip_of_file(handle: ModelHandle, source: TextEncoderFile) -> comfy.sd.CLIP:
    """The CLIP of a text encoder file that is in the workers; ValueError where its tokenizer is damaged."""
    # As a tensor, which is how ComfyUI hands a file's tokenizer on.
    data = torch.frombuffer(bytearray(source.read_tokenizer()), dtype=torch.uint8)
    try:
        tokenizer = PromptTokenizer(folder_paths.get_folder_paths("embeddings"), {"tekken_model": data})
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"the tokenizer in {source.path} cannot be read ({error!r}); download the file again"
        ) from error
    return wrap_clip(RemoteFlux2TE(handle, source), tokenizer)
