"""ParallelismConfig refuses what cannot work, with the numbers and the remedy in the message."""

import itertools
import re
import subprocess
import sys

import pytest

from parallel_backend import ParallelismConfig


@pytest.mark.parametrize(
    ("degrees", "name", "world"),
    [
        ((1, 1, 1), "single", 1),
        ((4, 1, 2), "Ulysses-4-TP-2", 8),
        ((1, 4, 2), "Ring-4-TP-2", 8),
        ((2, 3, 5), "USP-2-3-TP-5", 30),
        ((1, 8, 1), "Ring-8", 8),
        ((1, 1, 4), "TP-4", 4),
    ],
)
def test_name_and_number_of_ranks(degrees, name, world):
    config = ParallelismConfig(*degrees)
    assert (config.name, config.world_size, config.cp_size) == (name, world, degrees[0] * degrees[1])


def test_arguments_are_ulysses_ring_tp():
    assert ParallelismConfig(2, 3, 5) == ParallelismConfig(tp_size=5, ring_size=3, ulysses_size=2)


def test_none_means_not_asked_for():
    config = ParallelismConfig(ulysses_size=None, ring_size=2, tp_size=None)
    assert config == ParallelismConfig(ring_size=2)
    assert config.describe() == "ulysses_size=1, ring_size=2, tp_size=1 (product 2)"


@pytest.mark.parametrize("value", [0, -2, 2.0, "2", True], ids=repr)
@pytest.mark.parametrize("name", ["ulysses_size", "ring_size", "tp_size"])
def test_a_degree_that_is_no_positive_whole_number(name, value):
    with pytest.raises(ValueError, match="whole number of at least 1") as caught:
        ParallelismConfig(**{name: value})
    assert f"{name} must" in str(caught.value)
    assert f"{name}={value!r}" in str(caught.value)


def test_every_bad_degree_is_named():
    with pytest.raises(ValueError, match=re.escape("ulysses_size and tp_size must")):
        ParallelismConfig(ulysses_size=0, ring_size=2, tp_size=-1)


def test_the_product_is_in_the_message_of_a_wrong_world():
    config = ParallelismConfig(ulysses_size=3, ring_size=2, tp_size=2)
    config.check_world(12)
    with pytest.raises(ValueError, match=re.escape("ulysses_size=3, ring_size=2, tp_size=2 (product 12)")) as caught:
        config.check_world(8)
    assert "the 8 available rank(s)" in str(caught.value)
    assert "start 12 rank(s)" in str(caught.value)


@pytest.mark.parametrize(
    ("degrees", "heads"), [((4, 1, 3), 48), ((3, 1, 1), 8), ((2, 1, 4), 12), ((16, 1, 1), 24), ((5, 1, 1), 7)]
)
def test_head_counts_that_do_not_divide(degrees, heads):
    config = ParallelismConfig(*degrees)
    if heads % (degrees[0] * degrees[2]) == 0:
        config.check_heads(heads, "this model")
        return
    with pytest.raises(ValueError, match=rf"this model has {heads} attention heads") as caught:
        config.check_heads(heads, "this model")
    found = re.findall(r"ulysses (\d+), ring (\d+), tp (\d+)", str(caught.value))
    named = {(int(u), int(t)) for u, _, t in found}
    assert {int(u) * int(r) * int(t) for u, r, t in found} == {config.world_size}
    world = config.world_size
    fitting = {
        (u, t)
        for u, r, t in itertools.product(range(1, world + 1), repeat=3)
        if u * r * t == world and heads % (u * t) == 0
    }
    assert named == fitting
    for u, t in named:
        ParallelismConfig(ulysses_size=u, ring_size=world // (u * t), tp_size=t).check_heads(heads, "this model")


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("degrees", [(2, 1, 2), (4, 2, 1), (1, 1, 8), (6, 1, 4)])
def test_degrees_for_other_ranks_divide_what_the_old_ones_divide(degrees, ranks):
    layout = ParallelismConfig(*degrees)
    found = layout.shrunk(ranks)
    assert found.world_size == ranks
    assert (layout.ulysses_size * layout.tp_size) % (found.ulysses_size * found.tp_size) == 0
    assert ParallelismConfig(2, 1, 2).shrunk(2).degrees() == "ulysses 1, ring 1, tp 2"


def test_ring_does_not_split_heads():
    ParallelismConfig(ring_size=7).check_heads(8, "this model")


class TestExtraParallelModules:
    """`extra_parallel_modules` as a field and, as cache-dit's users write it, in `parallel_kwargs`."""

    def test_both_spellings_say_the_same(self):
        module = object()
        field = ParallelismConfig(tp_size=2, extra_parallel_modules=[module, "vae"])
        kwargs = ParallelismConfig(tp_size=2, parallel_kwargs={"extra_parallel_modules": [module, "vae"]})
        assert field.extra_parallel_modules == kwargs.extra_parallel_modules == (module, "vae")
        assert field == kwargs
        assert hash(field) == hash(kwargs)

    def test_a_module_named_twice_is_there_once(self):
        module = object()
        config = ParallelismConfig(
            extra_parallel_modules=[module, "vae", module],
            parallel_kwargs={"extra_parallel_modules": [module, "".join(["va", "e"]), "text_encoder", "text_encoder"]},
        )
        assert config.extra_parallel_modules == (module, "vae", "text_encoder")

    @pytest.mark.parametrize("empty", [None, (), []], ids=repr)
    def test_none_given(self, empty):
        config = ParallelismConfig(
            extra_parallel_modules=empty, parallel_kwargs=None if empty is None else {"extra_parallel_modules": empty}
        )
        assert config.extra_parallel_modules == ()

    def test_none_in_parallel_kwargs(self):
        config = ParallelismConfig(parallel_kwargs={"extra_parallel_modules": None})
        assert config.extra_parallel_modules == ()

    @pytest.mark.parametrize("one", ["text_encoder", object()], ids=["name", "module"])
    def test_one_that_is_not_in_a_list(self, one):
        assert ParallelismConfig(extra_parallel_modules=one).extra_parallel_modules == (one,)
        kwargs = ParallelismConfig(parallel_kwargs={"extra_parallel_modules": one})
        assert kwargs.extra_parallel_modules == (one,)

    def test_an_unknown_key_is_named(self):
        with pytest.raises(ValueError, match=r"unknown key 'attention_backend'.*'extra_parallel_modules'"):
            ParallelismConfig(parallel_kwargs={"attention_backend": "native"})


def test_making_a_configuration_does_not_import_torch():
    code = "import sys, parallel_backend.config; print('torch' in sys.modules, 'diffusers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["False", "False"]
