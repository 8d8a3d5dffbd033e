"""The soak, short in ``make test-all`` and long in ``make soak``."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest

from tests.comfyui.qwen_models import PIPELINE as QWEN
from tests.comfyui.qwen_models import make_qwen_pipeline

from .leaks import growth
from .soak import VARIANTS, lines, soak

PROMPTS = int(os.environ.get("HYBRID_DIT_SOAK", "0"))
"""Prompts with faults of the long form; 0: the short one."""
REPORT = os.environ.get("HYBRID_DIT_SOAK_REPORT")
FLAT_KIB = 512.0
"""What memory may grow by a prompt in the long form: half of the smallest leak that has to be found."""
ROUNDS = 12
"""Quiet rounds of the long form that are judged: enough for that leak to stand out of what comes and goes."""


@pytest.mark.thorough
@pytest.mark.timeout(3 * 3600 if PROMPTS else 300)
def test_soak(server, orders, home, comfyui):
    make_qwen_pipeline(home / "models" / QWEN, comfyui / "comfy" / "text_encoders" / "qwen25_tokenizer")
    if PROMPTS:
        findings = soak(server, orders, PROMPTS, rounds=ROUNDS + 1, variants=len(VARIANTS))
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


@pytest.mark.parametrize("total", [1_000_000, 2_800_000], ids=["a server", "workers"])
def test_growth_is_told_from_noise(total):
    """What was seen in a run without a leak: up to 20 MiB that come and go, in no order, of up to 2.7 GiB."""
    prompts = 5
    found: dict[int, list[float]] = {0: [], 1024: []}
    for seed in range(200):
        noise = random.Random(seed)
        seen = [total + noise.uniform(0, 20 * 1024) for _ in range(ROUNDS)]
        for leak, growths in found.items():
            values = [value + leak * prompts * number for number, value in enumerate(seen)]
            growths.append(growth(values) / prompts)
    assert max(found[0]) < FLAT_KIB < min(found[1024])
    print(f"without a leak up to {max(found[0]):.0f} KiB a prompt, with 1024 KiB {min(found[1024]):.0f} at least")
