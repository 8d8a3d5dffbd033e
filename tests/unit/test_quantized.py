"""Weights in every number format of ComfyUI: what a rank reads of them, and what it multiplies with."""

from __future__ import annotations

import itertools
import json
import math
import re

import pytest
import torch
import torch.nn.functional as F
from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from parallel_backend.loading import quantized, staging, targets
from parallel_backend.loading.file_reader import FileReader
from parallel_backend.loading.quantized_weight import QuantizedSlice
from parallel_backend.loading.single_file import open_single_file
from parallel_backend.loading.text_encoder_file import open_text_encoder_file
from parallel_backend.loading.weight_loader import load_weights, shard_bytes
from parallel_backend.mesh import Axis
from parallel_backend.parallel.formats import FORMATS as KNOWN
from parallel_backend.parallel.products import Adapted, Product, named_weights, product_of, restored, stored_tensors
from parallel_backend.parallel.quantized import Quantized, SideBySide, has_units
from parallel_backend.parallel.tensor import Shard, WholeLinear, apply_tensor_parallel, coarser, whole_blocks
from parallel_backend.parallelize import shard_text_model
from parallel_backend.runtime.rank.host_copy import HostCopy
from tests.errors import relative_error
from tests.quantized_file import FORMATS, NATIVE, needs_kitchen, quantize, quantize_weight
from tests.single_file import flux2_tensors, write
from tests.text_encoder_file import text_tensors

pytestmark = needs_kitchen
CPU = torch.device("cpu")
EVERY = pytest.mark.parametrize("form", FORMATS)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Format -> the file's path and what diffusers makes of the tensors that its own stand for; made when asked for."""
    folder, made = tmp_path_factory.mktemp("quantized"), {}
    tensors = flux2_tensors(heads=4, double=1, single=1)

    def file(form, **options):
        key = form + "".join(f"-{name}" for name in options)
        if key not in made:
            stored, metadata, meant = quantize(tensors, form, **options)
            path = write(folder / f"{key}.safetensors", stored, metadata=metadata)
            made[key] = path, convert_flux2_transformer_checkpoint_to_diffusers(dict(meant))
        return made[key]

    return file


def load(path, degree=1, rank=0, fp8="stored", dtype=torch.float32):
    """A rank's transformer, its table, and the bytes that it holds."""
    source = open_single_file(path)
    kind = source.family.transformer
    model = kind.build(source.transformer_config)
    plan = kind.plan(dict(model.config))
    table = apply_tensor_parallel(model, plan, Axis(None, degree, rank)) or whole_blocks(model, plan)
    weights = source.weights("transformer")
    expected = shard_bytes(model, weights, table, dtype, fp8)
    held = load_weights(model, weights, table, device=CPU, dtype=dtype, fp8=fp8)
    assert held == expected, "what was planned for is what it takes"
    return model, table


def near(actual, expected):
    assert actual.shape == expected.shape
    assert relative_error(actual, expected) <= 1e-6


@EVERY
@pytest.mark.parametrize(("degree", "fp8"), [(1, "cast"), (2, "stored"), (4, "cast"), (4, "stored")])
def test_each_rank_has_its_slices(files, form, degree, fp8):
    """Fused thirds, blocks of rows and columns, tiles of scales, groups that are turned, and cuts off their grid."""
    path, meant = files(form)
    stayed = 0
    for rank in range(degree):
        model, table = load(path, degree, rank, fp8)
        for name, weight in named_weights(model).items():
            full = meant[name]
            expected = table[name].take(full) if name in table else full
            if isinstance(weight, Product):
                stayed += 1
                near(weight.dense(torch.float32), expected)
            else:
                near(weight.detach(), expected)
    # Attention's outputs are 512 columns, of 2 groups; MLPs have 6 groups, which 4 ranks cannot have whole.
    assert (stayed > 0) == (fp8 == "stored")


@pytest.mark.parametrize("form", ["nvfp4", "mxfp8", "int8_convrot"])
def test_what_is_cut_off_its_grid_is_held_dense(files, form):
    path, _ = files(form)
    model, _ = load(path, 4, 1)
    held = named_weights(model)
    into, out = held["transformer_blocks.0.ff.linear_in.weight"], held["transformer_blocks.0.attn.to_out.0.weight"]
    assert isinstance(into, Product)
    # 128 columns: of a group of 256 the half, of tiles of 64 or 128 whole ones.
    assert isinstance(out, Product) == (form != "int8_convrot")


@pytest.mark.parametrize(
    "form", [pytest.param(form, marks=pytest.mark.thorough) if form == "w4a8" else form for form in FORMATS]
)  # whose bytes are the slowest to make
def test_the_header_s_table_and_bytes_for_what_has_no_name(files, form):
    for options in ({"table": True}, {"as_bytes": True}, {"nested": True}):
        path, meant = files(form, **options)
        model, _ = load(path, fp8="cast")
        name = "single_transformer_blocks.0.attn.to_out.weight"
        near(model.get_parameter(name).detach(), meant[name])


def test_inputs_are_smoothed(files):
    path, meant = files("nvfp4", smooth=True)
    for degree in (1, 2):
        model, table = load(path, degree, degree - 1)
        name = "transformer_blocks.0.ff.linear_out"
        product = product_of(model.get_submodule(name))
        x = torch.randn(3, product.shape[1], generator=torch.Generator().manual_seed(0))
        full = meant[f"{name}.weight"]
        full = table[f"{name}.weight"].take(full) if degree > 1 else full
        near(product.product(x), F.linear(x, full))
        near(product.dense(torch.float32), full)


@pytest.mark.parametrize("form", ["int8_convrot", "nvfp4"])
@pytest.mark.parametrize("degree", [1, 2])
def test_each_byte_is_read_once(files, form, degree, read):
    path, _ = files(form)
    model, _ = load(path, degree, degree - 1)
    stored = open_single_file(path).weights("transformer")
    plain = sum(weight.nbytes for weight in named_weights(model).values() if isinstance(weight, torch.Tensor))
    parts = sum(t.nbytes for w in named_weights(model).values() if isinstance(w, Product) for t in w.tensors())
    assert sum(read) == plain + parts
    if degree == 1:
        every = {t.key: t.nbytes for w in stored.values() for t, *_ in w.pieces}
        every |= {t.key: t.nbytes for w in stored.values() if w.layer for t in w.layer.parts.values()}
        shared = parts + plain - sum(every.values())
        assert shared <= 4 * 512, "but for numbers that all blocks of columns share"


@pytest.mark.parametrize("form", ["nvfp4", "awq"])
def test_small_buffers(files, form, monkeypatch):
    for module in (staging, targets):
        monkeypatch.setattr(module, "BUFFER_BYTES", 2000)
    path, meant = files(form)
    model, table = load(path, 2, 1)
    name = "single_transformer_blocks.0.attn.to_out.weight"
    near(named_weights(model)[name].dense(torch.float32), table[name].take(meant[name]))


def draw(form, rows=512, columns=1024, native=True):
    """A product in a format, and the weight that it stands for."""
    from parallel_backend.parallel.quantized import Layout

    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)) * columns**-0.5
    parts, dense = quantize_weight(weight, form)
    name, _, _, said = FORMATS[form]
    options = {**KNOWN[name].options, **said}
    order = [part for part in KNOWN[name].parts if part in parts]
    held = [
        parts[part].view(torch.uint8) if part == "weight_scale" and form == "mxfp8" else parts[part] for part in order
    ]
    return Quantized(Layout(name, options, order, native and has_units(name, CPU)), held), dense


# Of a product with quantized inputs against one with exact inputs: 8 and 4 bits of a token's largest number.
ROUNDING = {"int8": 0.02, "int8_rows": 0.02, "int8_convrot": 0.02, "w4a8": 0.02, "w4a4": 0.3}


@torch.no_grad()
@EVERY
def test_a_product_and_its_parts(form):
    product, dense = draw(form)
    assert product.layout.native == (form in NATIVE)
    x = torch.randn(2, 5, 1024, generator=torch.Generator().manual_seed(2))
    bias = torch.randn(512, generator=torch.Generator().manual_seed(3))
    expected, rounding = F.linear(x, dense, bias), ROUNDING.get(form, 1e-6)
    whole = product.product(x, bias)
    assert relative_error(whole, expected) <= rounding
    if form in NATIVE:
        assert relative_error(whole, expected) > rounding / 20, "its inputs are quantized"
    # Rows are bit-equal; columns are closer to the exact product than the whole is, or as close.
    first, last = product.split_rows(128)
    assert torch.equal(torch.cat([first.product(x, bias[:128]), last.product(x, bias[128:])], -1), whole)
    if form in NATIVE:  # each token has a scale of its own
        assert torch.equal(torch.cat([product.product(x[:, :2], bias), product.product(x[:, 2:], bias)], 1), whole)
    late, early = product.split_columns(512)
    parts = late.added(early.product(x[..., 512:], bias), x[..., :512])
    assert relative_error(parts, expected) <= 1.1 * max(relative_error(whole, expected), 1e-6)
    beside = SideBySide([product.columns(0, 512), product.columns(512, 1024)])
    assert torch.equal(beside.columns(0, 512).product(x[..., :512]), late.product(x[..., :512]))
    assert relative_error(beside.product(x, bias), expected) <= 1.1 * max(relative_error(whole, expected), 1e-6)
    assert torch.equal(beside.rows(128, 256).dense(torch.float32), beside.dense(torch.float32)[128:256])
    near(beside.dense(torch.float32), dense)
    for odd in (product.rows(3, 77), product.columns(5, 71), beside.columns(500, 700)):
        assert odd.dense(torch.float32).shape == odd.shape
    assert torch.equal(product.rows(3, 77).dense(torch.float32), product.dense(torch.float32)[3:77])
    again = restored(product.kind, product.tensors())
    assert torch.equal(again.product(x, bias), whole)
    both = restored(beside.kind, beside.tensors())
    assert torch.equal(both.product(x, bias), beside.product(x, bias))
    adapted = Adapted(product, torch.ones(2, 1024), torch.ones(512, 2), torch.ones(2))
    near(restored(adapted.kind, adapted.tensors()).product(x), adapted.product(x))


def parts_of(linear, x):
    """As blocks use a linear: by rows, and by columns, one added to the other."""
    first, last = product_of(linear).split_rows(128)
    late, early = product_of(linear).split_columns(512)
    y = early.product(x[..., 512:], linear.bias)
    return first.product(x), last.product(x), late.add_to(y, x[..., :512])


def draw_linear(form):
    product, _ = draw(form)
    return WholeLinear(SideBySide([product.columns(0, 512), product.columns(512, 1024)]), torch.zeros(512))


@torch.no_grad()
@EVERY
def test_compiled_as_one_graph(form):
    x, linear = torch.randn(2, 5, 1024, generator=torch.Generator().manual_seed(2)), draw_linear(form)
    compiled = torch.compile(parts_of, fullgraph=True, dynamic=True, backend="aot_eager")
    for one, two in zip(compiled(linear, x), parts_of(linear, x), strict=True):
        near(one, two)


@torch.inference_mode()
def test_a_format_is_compiled_once():
    """By inductor: the layers of a format share one graph, whatever lies between them, and none is broken."""
    torch.compiler.reset()
    graphs = CompileCounterWithBackend("inductor")
    compiled = torch.compile(parts_of, fullgraph=True, dynamic=True, backend=graphs)
    x = torch.randn(2, 5, 1024, generator=torch.Generator().manual_seed(2))
    for form, count in (("int8_convrot", 1), ("int8_convrot", 1), ("nvfp4", 2), ("int8_convrot", 2), ("nvfp4", 2)):
        linear = draw_linear(form)
        for one, two in zip(compiled(linear, x), parts_of(linear, x), strict=True):
            near(one, two)
        assert graphs.frame_count == count


@EVERY
def test_to_the_host_and_back(files, form):
    """Moved as `Component` moves weights: by the data of what `stored_tensors` gives."""
    path, _ = files(form)
    model, _ = load(path, 2, 1, fp8="matmul")
    name = "transformer_blocks.0.ff.linear_in"
    linear = model.get_submodule(name)
    x = torch.randn(3, 512, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        before = product_of(linear).product(x)
        tensors = stored_tensors(model)
        copies = HostCopy(tensors)
        for tensor, moved in zip(tensors, copies.tensors, strict=True):
            tensor.data = moved
        for tensor in stored_tensors(model):
            tensor.data = tensor.data.clone()
        del copies
        assert torch.equal(product_of(linear).product(x), before)


@pytest.mark.parametrize("full_precision", [False, True])
def test_which_are_multiplied_as_they_are(files, full_precision):
    path, _ = files("int8_convrot", **({"full_precision": True} if full_precision else {}))
    for fp8 in ("matmul", "stored"):
        product = product_of(load(path, fp8=fp8)[0].get_submodule("transformer_blocks.0.ff.linear_in"))
        assert product.layout.native == (fp8 == "matmul" and not full_precision)
    blocks = product_of(load(path, fp8="matmul")[0].get_submodule("single_transformer_blocks.0.attn.to_out"))
    assert [block.shape for block in blocks.blocks] == [(512, 512), (512, 1536)], "what is multiplied apart"


@pytest.mark.parametrize(
    ("form", "capability", "kernels", "native"),
    [
        ("nvfp4", (10, 0), True, True), ("mxfp8", (12, 0), True, True), ("nvfp4", (12, 0), False, False),
        ("int8_tensorwise", (7, 5), True, True), ("int8_tensorwise", (7, 0), True, False),
        ("int8_tensorwise", (9, 0), False, False), ("asym_w4a8_int8", (7, 5), True, False),
        ("convrot_w4a4", (9, 0), True, True), ("nvfp4", (9, 0), True, False), ("mxfp8", (9, 0), True, False),
    ],
)  # fmt: skip
def test_gpus_with_units(monkeypatch, form, capability, kernels, native):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr("parallel_backend.parallel.quantized.has_kernels", lambda device: kernels)
    monkeypatch.setattr("parallel_backend.parallel.quantized.works", lambda form, device: True)
    assert has_units(form, torch.device("cuda")) == native
    monkeypatch.setattr("parallel_backend.parallel.quantized.works", lambda form, device: False)
    assert has_units(form, torch.device("cuda")) == (native and form not in ("nvfp4", "mxfp8"))


def spoiled(tmp_path, form, change):
    """The path of a file with a change to its tensors."""
    tensors = flux2_tensors(heads=2, double=1, single=1)
    stored, metadata, _ = quantize(tensors, form, part="single_blocks.0.linear1")
    change(stored)
    return write(tmp_path / "model.safetensors", stored, metadata=metadata)


LAYER = "single_blocks.0.linear1"


@pytest.mark.parametrize(
    ("form", "part"),
    [(form, part) for form in ("int8_convrot", "nvfp4", "mxfp8", "w4a8", "w4a4", "awq")
     for part, rule in KNOWN[FORMATS[form][0]].parts.items() if not rule.optional and part != "weight"],
)  # fmt: skip
def test_a_missing_or_wrong_part_is_named_before_anything_starts(tmp_path, form, part):
    key = f"{LAYER}.{part}"
    with pytest.raises(ValueError, match=rf"there is no tensor {key} in .*model.safetensors"):
        open_single_file(spoiled(tmp_path, form, lambda tensors: tensors.pop(key)))

    def longer(tensors):
        tensors[key] = torch.cat([tensors[key].reshape(-1).view(torch.uint8)] * 2).view(tensors[key].dtype)

    with pytest.raises(ValueError, match=rf"{key} in .* has shape .*, where .* has \["):
        open_single_file(spoiled(tmp_path, form, longer))

    def other(tensors):
        tensors[key] = torch.zeros(tensors[key].shape, dtype=torch.int64)

    with pytest.raises(ValueError, match=rf"{key} in .* is stored as I64"):
        open_single_file(spoiled(tmp_path, form, other))


@pytest.mark.parametrize(
    ("form", "part", "bits"),
    [("int8", "weight_scale", None), ("int8_convrot", "weight_scale", None), ("nvfp4", "weight_scale", 0x7F),
     ("nvfp4", "weight_scale_2", None), ("mxfp8", "weight_scale", 0xFF), ("mxfp8", "weight", 0xFF),
     ("w4a8", "weight_s_rel", 0xFF), ("w4a8", "weight_s_channel", None), ("w4a8", "weight_codebook", None),
     ("w4a4", "weight_scale", None), ("awq", "weight_zeros", None)],
)  # fmt: skip
@pytest.mark.parametrize("fp8", ["stored", "cast"])
def test_values_that_are_no_numbers_are_named(tmp_path, form, part, bits, fp8):
    key = f"{LAYER}.{part}"

    def spoil(tensors):
        if bits is None:
            tensors[key].view(-1)[-1] = float("nan")
        else:
            tensors[key].view(torch.uint8).view(-1)[0] = bits

    path = spoiled(tmp_path, form, spoil)
    with pytest.raises(ValueError, match=rf"{key} in .*model.safetensors holds values that are not finite"):
        load(path, fp8=fp8)


@pytest.mark.parametrize(
    ("says", "words"),
    [
        ({"convrot_groupsize": 100}, "convrot_groupsize is 100, where a power of 4"),
        ({"convrot_groupsize": "256"}, "convrot_groupsize is 256, where a number"),
        ({"convrot_groupsize": 1024}, r"512 columns, no multiple of its groups of 1024"),
        ({"convrot": "yes"}, "convrot is yes, where true or false"),
        ({"format": "svdquant_w4a4"}, "in the format svdquant_w4a4, which is not read"),
        ({"format": None}, "in the format None, which is not read"),
    ],
    ids=str,
)
def test_what_a_file_says_and_cannot_mean(tmp_path, says, words):
    def change(tensors):
        said = {"format": "int8_tensorwise", "convrot": True, **says}
        tensors[f"{LAYER}.comfy_quant"] = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)

    tensors = flux2_tensors(heads=4, double=1, single=1)
    stored, _, _ = quantize(tensors, "int8_convrot", part=LAYER)
    change(stored)
    with pytest.raises(ValueError, match=words):
        open_single_file(write(tmp_path / "model.safetensors", stored))


def test_tensors_that_a_format_has_no_place_for(tmp_path):
    def more(tensors):
        tensors[f"{LAYER}.weight_scale_2"] = torch.ones(())

    with pytest.raises(ValueError, match=rf"{LAYER}.weight_scale_2 in .* no place"):
        open_single_file(spoiled(tmp_path, "int8", more))


def test_integers_that_nothing_is_said_of(tmp_path):
    with pytest.raises(
        ValueError, match=rf"{LAYER}.weight in .* is stored as I8 \(8-bit integers\), which is not read"
    ):
        open_single_file(spoiled(tmp_path, "int8", lambda tensors: tensors.pop(f"{LAYER}.comfy_quant")))


def test_without_the_library(files, monkeypatch):
    path, _ = files("int8_convrot")
    monkeypatch.setattr(quantized, "has_kitchen", lambda: False)
    with pytest.raises(ValueError, match=r"has weights in int8, for which comfy-kitchen is needed: install"):
        open_single_file(path)


@pytest.mark.parametrize("form", ["nvfp4", "awq", "w4a8"])
@pytest.mark.parametrize("degree", [1, 2, 3, 5])
def test_every_cut_of_every_part(form, degree, tmp_path):
    """Rows and columns off all grids, in ranges that do not follow each other."""
    from parallel_backend.loading.safetensors_reader import StoredLayer, Weight, read_header
    from parallel_backend.parallel.tensor import ParamShard

    rows, columns = 400, 768
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
    parts, dense = quantize_weight(weight, form)
    path = write(tmp_path / "one.safetensors", parts)
    stored = read_header(path)
    name, _, _, said = FORMATS[form]
    layer = StoredLayer(
        name, {**KNOWN[name].options, **said}, {k: stored[k] for k in KNOWN[name].parts if k in stored}, True
    )
    for pieces in (((0, rows),), ((200, 400), (0, 200)), ((128, 256),)):
        made = Weight(tuple((layer.parts["weight"], a, b) for a, b in pieces), layer=layer)
        full = torch.cat([dense[a:b] for a, b in pieces])
        assert made.shape == tuple(full.shape)
        for dim in (0, 1):
            size = full.shape[dim]
            half = size // 2
            edges = [round(half * i / degree) for i in range(degree + 1)]
            for a, b in itertools.pairwise(edges):
                shard = ParamShard(dim, ((a, b), (half + a, half + b)), size)
                part = QuantizedSlice("one", made, shard)
                with FileReader() as reader:
                    jobs = list(part.jobs(CPU, 1000))
                    for job in jobs:
                        reader.read(job.part, job.into.numpy())
                expected = shard.take(full)
                out = torch.full_like(expected, math.nan)
                part.dense_in(out)
                near(out, expected)
                if part.on_grid:
                    near(part.product(False).dense(torch.float32), expected)


@pytest.mark.parametrize("form", ["int8_convrot", "nvfp4", "mxfp8"])
def test_a_text_encoder(tmp_path, form):
    """Linears stay quantized, the table of tokens is made dense; both on each of two ranks."""
    tensors = text_tensors(layers=30, hidden=256)
    kept = {key: tensor for key, tensor in tensors.items() if key != "tekken_model"}
    chosen = lambda name, tensor: tensor.shape[1] % 256 == 0 and not re.search(r"layers\.[1-9]", name)  # noqa: E731
    stored, metadata, meant = quantize(kept, form, part="model.", chosen=chosen)
    path = write(tmp_path / "text.safetensors", stored | {"tekken_model": tensors["tekken_model"]}, metadata=metadata)
    source = open_text_encoder_file(path)
    kind = source.family.needs_text_encoder()
    for degree in (1, 2):
        model = kind.build(source.text_config)
        table = shard_text_model(model, kind, source.text_config, Axis(None, degree, degree - 1))
        load_weights(model, source.weights("text_encoder"), table, device=CPU, dtype=torch.float32, fp8="stored")
        held = named_weights(model)
        assert isinstance(held["layers.0.self_attn.q_proj.weight"], Product)
        assert isinstance(held["embed_tokens.weight"], torch.Tensor)
        for name, weight in held.items():
            full = meant[f"model.{name}"]
            expected = table[name].take(full) if name in table else full
            near(weight.dense(torch.float32) if isinstance(weight, Product) else weight.detach(), expected)


def test_unequal_parts_end_where_groups_do():
    """Wan's MLP of 54 groups on 4 ranks; in the number formats that keep no more together it is cut as before."""
    model = nn.ModuleDict({"into": nn.Linear(8, 13824), "out": nn.Linear(13824, 8)})
    plan = {name: Shard(style, units=108, groups=1) for name, style in (("into", "column"), ("out", "row"))}
    assert coarser(model, plan, 1, 4) == coarser(model, plan, 128, 4) == plan
    shards = coarser(model, plan, 256, 4)
    ranges = [shards["into"].ranges(13824, Axis(None, 4, rank)) for rank in range(4)]
    assert ranges == [shards["out"].ranges(13824, Axis(None, 4, rank)) for rank in range(4)]
    assert sorted(b - a for ((a, b),) in ranges) == [13 * 256, 13 * 256, 14 * 256, 14 * 256]
    assert coarser(model, plan, 8192, 4) == plan, "no rank is left without any"
