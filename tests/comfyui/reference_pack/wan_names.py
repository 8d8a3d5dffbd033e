"""Names of the Qwen-Image VAE's weights in ComfyUI's files."""

from __future__ import annotations

import re
from collections.abc import Iterable


def to_wan_names(names: Iterable[str]) -> dict[str, str]:
    """Names of AutoencoderKLQwenImage's weights -> those that ComfyUI has for the same weights."""
    parts = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6"}
    parts["conv_shortcut"] = "shortcut"
    middle = {"resnets.0": "middle.0", "attentions.0": "middle.1", "resnets.1": "middle.2"}
    ends = {"conv_in": "conv1", "norm_out": "head.0", "conv_out": "head.2"}
    found = {}
    for name in names:
        new = re.sub(r"^(quant|post_quant)_conv", lambda m: {"quant": "conv1", "post_quant": "conv2"}[m[1]], name)
        new = re.sub(r"mid_block\.(\w+\.\d)", lambda m: middle[m[1]], new)
        new = re.sub(r"down_blocks\.", "downsamples.", new)
        # A level of the decoder has three blocks and, but for the last, what enlarges the picture.
        new = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"upsamples.{4 * int(m[1]) + int(m[2])}", new)
        new = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"upsamples.{4 * int(m[1]) + 3}", new)
        if re.search(r"(middle|samples)\.\d", new):
            new = re.sub(r"(?<=\.)(norm1|conv1|norm2|conv2|conv_shortcut)(?=\.)", lambda m: parts[m[1]], new)
        else:
            new = re.sub(r"(?<=coder\.)(conv_in|norm_out|conv_out)", lambda m: ends[m[1]], new)
        found[name] = new
    return found
