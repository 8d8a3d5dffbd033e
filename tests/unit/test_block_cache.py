"""The block cache on a tiny FLUX.2 in one process, against the algorithm written down with plain hooks."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from parallel_backend.cache.block_cache import BlockCache
from parallel_backend.cache.decision import Evaluation
from parallel_backend.cache.run import CacheRun
from parallel_backend.mesh import SINGLE
from tests.distributed import cache_cases
from tests.distributed.cache_cases import STEPS, THRESHOLD, settings
from tests.distributed.cases import FLUX2, flux2_inputs, tiny_transformer
from tests.distributed.qwen_cases import QWEN


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def model():
    return tiny_transformer(num_single_layers=4)


def inputs_at(step: int, inputs: dict) -> dict:
    return cache_cases.inputs_at(step, inputs, cache_cases.new_drift(inputs))


def run_cached(cache, plan, inputs, steps=STEPS, run="run", stream="") -> tuple[list, list]:
    outputs, decisions = [], []
    for step in range(steps):
        cache.plan(plan, Evaluation(run, stream, float(step), steps))
        outputs.append(cache.transformer(**inputs_at(step, inputs)).sample)
        decisions.append(cache.last)
    return outputs, decisions


def by_hand(transformer, head: int, tail_blocks: int, order: int, computed: list[bool], inputs: dict) -> list:
    """Outputs of the same steps: hooks on an untouched model replace what the middle blocks make of their input."""
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    doubles, last_middle = len(transformer.transformer_blocks), len(blocks) - tail_blocks - 1
    seen: dict = {}
    history: list[tuple[int, torch.Tensor]] = []
    state = {"step": 0}

    def joined(output) -> torch.Tensor:
        return torch.cat(output, dim=1) if isinstance(output, tuple) else output

    def forecast(step: int) -> torch.Tensor:
        (at, value), *older = history[::-1]
        out = value
        if order >= 1 and older:
            slope = (value - older[0][1]) / (at - older[0][0])
            out = out + slope * (step - at)
            if order >= 2 and len(older) >= 2:
                before = (older[0][1] - older[1][1]) / (older[0][0] - older[1][0])
                out = out + (slope - before) / (at - older[0][0]) * (step - at) ** 2 / 2
        return out

    def at_head(module, args, output):
        seen["entry"] = joined(output)

    def at_end(module, args, output):
        step = state["step"]
        if computed[step]:
            history.append((step, joined(output) - seen["entry"]))
            return None
        replaced = seen["entry"] + forecast(step)
        if not isinstance(output, tuple):
            return replaced
        text = output[0].shape[1]
        return replaced[:, :text], replaced[:, text:]

    handles = [blocks[head - 1].register_forward_hook(at_head), blocks[last_middle].register_forward_hook(at_end)]
    assert head <= last_middle
    assert doubles < len(blocks)
    outputs = []
    for step in range(len(computed)):
        state["step"] = step
        outputs.append(transformer(**inputs_at(step, inputs)).sample)
    for handle in handles:
        handle.remove()
    return outputs


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize(
    ("head", "tail"),
    [(1, 0), (2, 0), (3, 0), (1, 1), (2, 3), (1, 4)],
    ids=["in double", "end of double", "in single", "one at the end", "one in the middle", "tail from single on"],
)
def test_cached_steps_are_what_the_algorithm_says(head, tail, order):
    inputs = flux2_inputs(5, [(3, 5), (2, 2)], 2)
    cache = BlockCache(model(), FLUX2.transformer.block_stacks, SINGLE)
    plan = settings(order, Fn_compute_blocks=head, Bn_compute_blocks=tail)
    outputs, decisions = run_cached(cache, plan, inputs)
    computed = [decision.computed for decision in decisions]
    assert 3 <= sum(computed) <= STEPS - 3
    for ours, theirs in zip(outputs, by_hand(model(), head, tail, order, computed, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("references", [[], [(2, 4), (3, 3)]], ids=["alone", "with references"])
def test_the_difference_is_that_of_the_pictures_tokens_since_the_last_computed_step(references):
    inputs, transformer = flux2_inputs(5, [(3, 5), *references], 1), model()
    residuals: list[torch.Tensor] = []

    def note(module, args, kwargs, output):
        residuals.append((output[1] - kwargs["hidden_states"])[:, : 3 * 5])

    handle = transformer.transformer_blocks[0].register_forward_hook(note, with_kwargs=True)
    cache = BlockCache(transformer, FLUX2.transformer.block_stacks, SINGLE, FLUX2.transformer.picture_tokens)
    _, decisions = run_cached(cache, settings(), inputs)
    handle.remove()
    kept = None
    for residual, decision in zip(residuals, decisions, strict=True):
        if decision.diff is not None:
            expected = ((residual - kept).abs().mean() / kept.abs().mean()).item()
            assert decision.diff == pytest.approx(expected, rel=1e-4)
            assert decision.computed == (expected >= THRESHOLD)
        if decision.computed:
            kept = residual


def test_which_tokens_are_the_pictures():
    inputs = flux2_inputs(5, [(3, 5), (2, 4)], 2)
    assert FLUX2.transformer.picture_tokens(inputs) == 15
    assert (
        FLUX2.transformer.picture_tokens({"img_ids": inputs["img_ids"][None, 17:]}) == 0
    )  # of a rank with references alone
    shapes = [(1, 3, 5), (1, 2, 4)]
    assert QWEN.transformer.picture_tokens({"img_shapes": [shapes, shapes]}) == 15
    assert QWEN.transformer.picture_tokens({"img_shapes": [shapes[0]]}) == 15


def test_skipped_blocks_are_not_called_and_the_others_are():
    inputs, transformer = flux2_inputs(5, [(3, 5)], 1), model()
    calls: Counter = Counter()
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    for index, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda *_, index=index: calls.update([index]))
    cache = BlockCache(transformer, FLUX2.transformer.block_stacks, SINGLE)
    _, decisions = run_cached(cache, settings(Bn_compute_blocks=1), inputs)
    computed = sum(decision.computed for decision in decisions)
    assert [calls[index] for index in range(6)] == [STEPS, *[computed] * 4, STEPS]


def test_without_a_plan_and_at_threshold_0_nothing_changes():
    inputs, transformer = flux2_inputs(5, [(3, 5)], 1), model()
    expected = [transformer(**inputs_at(step, inputs)).sample for step in range(STEPS)]
    names = list(transformer.state_dict()), [name for name, _ in transformer.named_modules()]
    originals = transformer.transformer_blocks
    cache = BlockCache(transformer, FLUX2.transformer.block_stacks, SINGLE)
    assert (list(transformer.state_dict()), [name for name, _ in transformer.named_modules()]) == names
    for step in range(STEPS):
        assert torch.equal(transformer(**inputs_at(step, inputs)).sample, expected[step])
        assert cache.last is None
    outputs, decisions = run_cached(cache, settings(residual_diff_threshold=0), inputs)
    assert all(decision.computed for decision in decisions)
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    cache.remove()
    assert transformer.transformer_blocks is originals
    assert torch.equal(transformer(**inputs_at(3, inputs)).sample, expected[3])


@pytest.mark.parametrize("order", [0, 1])
def test_what_is_no_number_is_computed_and_reported_until_it_is_one_again(order):
    inputs, run = flux2_inputs(5, [(3, 5)], 1), CacheRun(settings(), steps=STEPS)
    cache = BlockCache(model(), FLUX2.transformer.block_stacks, SINGLE)
    for step in range(STEPS):
        evaluation = run.evaluation("", step)
        cache.plan(settings(order, residual_diff_threshold=1), evaluation)
        broken = {"hidden_states": inputs["hidden_states"] * (float("nan") if step == 4 else 1)}
        out = cache.transformer(**{**inputs_at(step, inputs), **broken}).sample
        assert bool(out.isfinite().all()) == (step != 4)
        run.note(evaluation, cache.last, 0.0)
    assert [e["reason"] for e in run.report()["evaluations"][3:7]] == ["threshold", *["not a number"] * 2, "threshold"]
    assert [e["computed"] for e in run.report()["evaluations"][3:7]] == [False, True, True, False]


def test_streams_runs_and_shapes_do_not_mix():
    first, second = flux2_inputs(5, [(3, 5)], 1), flux2_inputs(7, [(3, 5)], 1, seed=4)
    cache = BlockCache(model(), FLUX2.transformer.block_stacks, SINGLE)
    alone = [run_cached(cache, settings(1), inputs, run=f"alone{i}") for i, inputs in enumerate((first, second))]
    mixed: list = [[], []]
    for step in range(STEPS):
        for index, inputs in enumerate((first, second)):
            cache.plan(settings(1), Evaluation("mixed", str(index), float(step), STEPS))
            mixed[index].append(cache.transformer(**inputs_at(step, inputs)).sample)
    for index in range(2):
        assert all(torch.equal(a, b) for a, b in zip(mixed[index], alone[index][0], strict=True))
    # Another shape in the same stream begins from nothing; so does another run.
    cache.plan(settings(residual_diff_threshold=1), Evaluation("mixed", "0", 11.0, STEPS))
    cache.transformer(**flux2_inputs(5, [(4, 5)], 1))
    assert cache.last.reason == "nothing cached yet"
    assert cache.kept_bytes() > 0
    for run in ("alone0", "alone1", "mixed"):
        cache.forget(run)
    assert cache.kept_bytes() == 0


def test_an_error_in_a_block_leaves_the_cache_usable():
    inputs, transformer = flux2_inputs(5, [(3, 5)], 1), model()
    expected = transformer(**inputs_at(0, inputs)).sample
    cache = BlockCache(transformer, FLUX2.transformer.block_stacks, SINGLE)

    def fail(*_):
        raise RuntimeError("out of memory")

    handle = transformer.single_transformer_blocks[2].register_forward_pre_hook(fail)
    cache.plan(settings(), Evaluation("run", "", 0.0))
    with pytest.raises(RuntimeError, match="out of memory"):
        transformer(**inputs_at(0, inputs))
    handle.remove()
    assert torch.equal(transformer(**inputs_at(0, inputs)).sample, expected)
    assert run_cached(cache, settings(), inputs, run="next")[1][0].reason == "nothing cached yet"


def test_compiled_blocks_are_not_compiled_again():
    inputs = flux2_inputs(5, [(3, 5)], 1)

    def frames(cached: bool) -> int:
        torch._dynamo.reset()
        counter, transformer = CompileCounter(), model()
        for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
            block.compile(backend=counter)
        cache = BlockCache(transformer, FLUX2.transformer.block_stacks, SINGLE)
        for step in range(STEPS):
            if cached:
                cache.plan(settings(1), Evaluation("run", "", float(step), STEPS))
            transformer(**inputs_at(step, inputs))
        assert not cached or cache.kept_bytes() > 0
        return counter.frame_count

    assert frames(cached=True) == frames(cached=False) > 0
