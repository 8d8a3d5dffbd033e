"""A CLIP whose prompts are a pipeline's own chat: its tokenizer and template, without ComfyUI's text encoder class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import comfy.model_management
import comfy.sd
import torch
from torch import Tensor

from ..parallel_backend.drawing.sampling import load_tokenizer
from ..parallel_backend.loading.pipeline_folder import PipelineFolder
from .comfy_clip import refuse_clip_layer, refuse_generation, weight_shapes, wrap_clip
from .comfy_patcher import RemotePart, meta_state_dict
from .graph_nodes import this_node
from .group import ModelHandle, check_interrupted
from .remote_modules import RemoteModule, add_modules, refuse_reach

TOKENS_KEY = "parallel_text_encoder"
Conversation = Callable[[str], list[dict[str, Any]]]


class ChatTokenizer:
    """Turns a prompt into the ids of the conversation that the text encoder was trained on, without padding.

    Args:
        source: has the tokenizer.
        conversation: of a prompt, as the tokenizer's chat template takes it.
    """

    def __init__(self, source: PipelineFolder, conversation: Conversation) -> None:
        self.conversation = conversation
        self.tokenizer = load_tokenizer(source.path)

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **options: Any) -> dict[str, list]:
        """``{"parallel_text_encoder": [[(id, 1.0), ...]]}``; as with ComfyUI's FLUX.2, weights are not parsed."""
        refused = [name for name, value in options.items() if value is not None and name != "tokenizer_options"]
        if refused:
            raise ValueError(
                f"{this_node()} gives the text encoder in the parallel workers {', '.join(refused)}, but it takes a "
                "prompt alone; disconnect that input"
            )
        encoded = self.tokenizer.apply_chat_template(
            self.conversation(text), add_generation_prompt=False, tokenize=True, return_dict=True
        )
        ids = encoded["input_ids"]
        return {TOKENS_KEY: [[(token, 1.0, 0) if return_word_ids else (token, 1.0) for token in ids]]}

    def untokenize(self, pairs: list) -> list:
        return [(pair, self.tokenizer.decode([pair[0]])) for pair in pairs]

    def state_dict(self) -> dict:
        return {}

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)


class RemoteTextEncoder(RemoteModule):
    """Stands where ComfyUI's text encoder model stands, without weights.

    Args:
        handle: of the model in the workers.
        shapes: the weights that patches may name.
        name: what ComfyUI calls the text encoder that it has for this model.
    """

    def __init__(self, handle: ModelHandle, shapes: Mapping[str, tuple[int, ...]], name: str) -> None:
        super().__init__()
        self.remote_part = RemotePart(handle, "text_encoder")
        self.dtypes = {torch.float32}
        self._shapes = {f"{name}.transformer.{key}": shape for key, shape in shapes.items()}
        add_modules(self, self._shapes, torch.float32)

    def state_dict(self, *args, destination=None, prefix="", keep_vars=False):
        return meta_state_dict(self._shapes, destination, prefix)

    def load_sd(self, *_: Any, **__: Any) -> None:
        refuse_reach("the text encoder")

    def load_state_dict(self, *_: Any, **__: Any) -> None:
        refuse_reach("the text encoder")

    def reset_clip_options(self) -> None:
        pass

    def set_clip_options(self, options: dict[str, Any]) -> None:
        refuse_clip_layer(options.get("layer"))

    def encode_token_weights(self, tokens: dict[str, list]) -> tuple[Tensor, None]:
        """Conditioning ``[1, L, C]`` in fp32, and no pooled output."""
        ids = torch.tensor([[entry[0] for entry in tokens[TOKENS_KEY][0]]])
        part = self.remote_part
        context = part.handle.get("text_encoder").encode_text(
            ids, torch.ones_like(ids), check=check_interrupted, adapters=part.adapters
        )
        return context.to(comfy.model_management.intermediate_device(), torch.float32), None

    def generate(self, *_: Any, **__: Any) -> None:
        refuse_generation()


def make_chat_clip(handle: ModelHandle, source: PipelineFolder, conversation: Conversation, name: str) -> comfy.sd.CLIP:
    """The CLIP of a pipeline whose text encoder is in the workers, for prompts of text alone; name as ComfyUI's."""
    encoder = RemoteTextEncoder(handle, weight_shapes(source), name)
    return wrap_clip(encoder, ChatTokenizer(source, conversation))
