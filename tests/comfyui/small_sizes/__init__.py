"""Makes ComfyUI's own loaders take text encoders of other sizes than the real ones, as told by the environment."""

from __future__ import annotations

import functools
import json
import os

import comfy.text_encoders.llama

SIZES = "HYBRID_DIT_TEST_SIZES"
"""Environment variable: JSON, name of ComfyUI's configuration -> its values that differ."""

for _name, _values in json.loads(os.environ[SIZES]).items():
    _config = getattr(comfy.text_encoders.llama, _name)
    setattr(comfy.text_encoders.llama, _name, functools.partial(_config, **_values))

NODE_CLASS_MAPPINGS: dict[str, type] = {}
