"""How `Flux2Pipeline` draws: a chat template padded to a fixed length, distilled guidance, references of any number."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from torch import Tensor

from ..drawing import Drawing, TextInputs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MAX_TEXT_TOKENS = 512
"""Length that diffusers pads a prompt to."""
REFERENCE_AREA = 1024 * 1024
"""Reference images with more pixels are made smaller."""
SCHEDULER = {
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "time_shift_type": "exponential",
}
"""FLUX.2-dev's own, of a `FlowMatchEulerDiscreteScheduler`."""

# Renders a conversation as Mistral-Small-3.2's template does; `content` is a string or a list of text parts.
CHAT_TEMPLATE = """\
{%- macro text_of(content) -%}
{%- if content is string -%}{{- content -}}
{%- else -%}{%- for part in content -%}
{%- if part['type'] == 'text' -%}{{- part['text'] -}}{%- else -%}{{- '[IMG]' -}}{%- endif -%}
{%- endfor -%}{%- endif -%}
{%- endmacro -%}
{{- '<s>' -}}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}{{- '[SYSTEM_PROMPT]' + text_of(message['content']) + '[/SYSTEM_PROMPT]' -}}
{%- elif message['role'] == 'user' -%}{{- '[INST]' + text_of(message['content']) + '[/INST]' -}}
{%- else -%}{{- text_of(message['content']) + '</s>' -}}{%- endif -%}
{%- endfor -%}"""


def tokenizer_of_tekken(content: bytes) -> PreTrainedTokenizerFast:
    """The tokenizer of a ``tekken.json``, as the text encoder's file has it, with Mistral's chat template."""
    # Imported where it is used: it takes a second.
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    stated = json.loads(content)
    config = stated["config"]
    specials = config["default_num_special_tokens"]  # whose ids come first
    words = [base64.b64decode(word["token_bytes"]) for word in stated["vocab"]]
    ranks = {word: rank for rank, word in enumerate(words[: config["default_vocab_size"] - specials])}
    letters = bytes_to_unicode()
    spelled = {word: "".join(letters[byte] for byte in word) for word in ranks}
    pairs = sorted(
        (rank, ranks[word[:cut]], ranks[word[cut:]], word[:cut], word[cut:])
        for word, rank in ranks.items()
        for cut in range(1, len(word))
        if word[:cut] in ranks and word[cut:] in ranks
    )
    vocabulary = {spelled[word]: rank + specials for word, rank in ranks.items()}
    vocabulary |= {token["token_str"]: token["rank"] for token in stated["special_tokens"]}
    merges = [(spelled[left], spelled[right]) for *_, left, right in pairs]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    words_first = pre_tokenizers.Split(Regex(config["pattern"]), "isolated") if config["pattern"] else None
    bytes_then = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([step for step in (words_first, bytes_then) if step is not None])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([token["token_str"] for token in stated["special_tokens"]])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left",
        chat_template=CHAT_TEMPLATE, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def conversation(prompt: str) -> list[dict[str, Any]]:
    """What the tokenizer's chat template turns into the text encoder's input."""
    from diffusers.pipelines.flux2.pipeline_flux2 import format_input

    return format_input([prompt])[0]


class Flux2Drawing(Drawing):
    """FLUX.2-dev: 50 steps, distilled guidance 4; reference images keep their size up to a megapixel."""

    title = "FLUX.2"
    guidance = 4.0
    most_images = 10  # as Black Forest Labs has it; diffusers does not count
    widest, shortest = 8.0, 64
    scheduler = SCHEDULER

    def file_tokenizer(self, content: bytes) -> PreTrainedTokenizerFast:
        return tokenizer_of_tekken(content)

    def default_size(self, images: Sequence[Image.Image]) -> tuple[int, int]:
        return self._reference_size(images[0])[1] if images else (self.width, self.height)

    def tokenize(self, tokenizer: Any, processor: Any, prompt: str, images: Sequence[Image.Image]) -> TextInputs:
        tokens = tokenizer.apply_chat_template(
            [conversation(prompt)],
            add_generation_prompt=False,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            padding="max_length",
            truncation=True,
            max_length=MAX_TEXT_TOKENS,
        )
        return TextInputs(tokens["input_ids"], tokens["attention_mask"])

    def set_timesteps(self, scheduler: Any, steps: int, tokens: int) -> None:
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        sigmas = np.linspace(1.0, 1 / steps, steps)
        scheduler.set_timesteps(sigmas=sigmas, mu=compute_empirical_mu(tokens, steps))
        scheduler.set_begin_index(0)

    def reference_pixels(self, images: Sequence[Image.Image]) -> list[Tensor]:
        from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor

        processor = Flux2ImageProcessor(vae_scale_factor=self.transformer.pixel_multiple)
        pixels = []
        for image in images:
            resized, (width, height) = self._reference_size(image)
            pixels.append(processor.preprocess(resized, height=height, width=width, resize_mode="crop"))
        return pixels

    def _reference_size(self, image: Image.Image) -> tuple[Image.Image, tuple[int, int]]:
        """A reference image of at most `REFERENCE_AREA`, and the width and height that its middle is cropped to."""
        if image.width * image.height > REFERENCE_AREA:
            from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor

            image = Flux2ImageProcessor._resize_to_target_area(image, REFERENCE_AREA)
        multiple = self.transformer.pixel_multiple
        return image, (image.width // multiple * multiple, image.height // multiple * multiple)
