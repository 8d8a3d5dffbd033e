"""The soak, short in ``make test`` and long in ``make soak``."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.comfyui.qwen_models import PIPELINE as QWEN
from tests.comfyui.qwen_models import make_qwen_pipeline

from .soak import VARIANTS, lines, soak

PROMPTS = int(os.environ.get("HYBRID_DIT_SOAK", "0"))
"""Prompts with faults of the long form; 0: the short one."""
REPORT = os.environ.get("HYBRID_DIT_SOAK_REPORT")
FLAT_KIB = 200.0
"""What memory may grow by a prompt in the long form. Python's and glibc's own allocations come and go by some."""


@pytest.mark.timeout(3 * 3600 if PROMPTS else 300)
def test_soak(server, orders, home, comfyui):
    make_qwen_pipeline(home / "models" / QWEN, comfyui / "comfy" / "text_encoders" / "qwen25_tokenizer")
    if PROMPTS:
        findings = soak(server, orders, PROMPTS, rounds=8, variants=len(VARIANTS))
    else:
        findings = soak(server, orders, 10, rounds=1, variants=3)
    report = findings.report()
    print(*lines(report), sep="\n")
    if REPORT:
        Path(REPORT).write_text(json.dumps(report, indent=1) + "\n")
    assert not report["wrong"]
    assert not report["leaks"]
    assert report["injected"] == (PROMPTS or 10) // 5
    assert report["recoveries"] == report["injected"]
    if PROMPTS:
        assert report["server_kib_a_prompt"] < FLAT_KIB
        assert report["worker_kib_a_prompt"] < FLAT_KIB
