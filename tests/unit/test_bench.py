"""The parts of the benchmarks: shares of a profile, random weights that are one model's, and a rank that is alone."""

import json

import pytest
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import eight_gpus, lora, neighbours, quantized_speed, wan_rows, wan_speed
from benchmarks.against_cache_dit import cache_of, layout_of, measured, to_markdown
from benchmarks.eight_gpus import MASKS, Row, rows_of
from parallel_backend.bench.alone import start_alone
from parallel_backend.bench.model import build_transformer, fill, make_inputs, transformer_config
from parallel_backend.bench.profile import Work, shares, union
from parallel_backend.bench.rank import Task
from parallel_backend.bench.shapes import SHAPES, shape_of
from parallel_backend.cache.config import parse_cache
from parallel_backend.config import ParallelismConfig
from parallel_backend.mesh import Axis, build_mesh
from parallel_backend.parallel.tensor import apply_tensor_parallel
from parallel_backend.planning.workload import count_workload
from tests.distributed.layouts import REFERENCE_TABLE

TINY = SHAPES["tiny"]
FEW = ("tiny", "qwen-image", "wan-5b")
"""Of each family one that is quickly counted."""


def test_shares_of_a_step():
    work = [
        Work("nvjet_tst_256x128", 0, 10),
        Work("ncclDevKernel_SendRecv", 4, 16),  # 6 under a GEMM, 2 alone, 4 under attention
        Work("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", 12, 20),
        Work("elementwise_kernel", 30, 33),
        Work("elementwise_kernel", 33, 34),
    ]
    found = shares(work, step_ms=40)
    assert found["ms"] == {"communication": 12, "attention": 8, "GEMM": 10, "rest": 4}
    assert (found["exposed_ms"], found["hidden_ms"]) == (2, 10)
    assert (found["busy_ms"], found["gaps_ms"]) == (24, 16)
    assert found["longest_rest"] == [[4, 2, "elementwise_kernel"]]
    assert found["count"] == 5


def test_a_comparison_goes_on_where_it_stopped(tmp_path):
    file, report = tmp_path / "rows.json", {"device": "a GPU", "task": {"steps": 10}}
    assert measured(None, report) == measured(file, report) == []
    rows = [{"layout": "TP-2", "side": "ours", "step_ms": [1.0]}, {"layout": "TP-2", "side": "cache-dit", "error": "x"}]
    file.write_text(json.dumps(report | {"rows": rows}))
    assert measured(file, report) == rows[:1]
    with pytest.raises(ValueError, match=r"of another measurement .*'steps': 10.*name another file"):
        measured(file, {"device": "a GPU", "task": {"steps": 12}})


def test_rows_of_the_reference_table():
    assert [row.name for row in rows_of("flux2-dev", 2)] == ["single", "TP-2", "Ulysses-2", "Ring-2"]
    names = [row.name for row in rows_of("flux2-dev", 8)]
    assert names[1:15] == list(eight_gpus.LAYOUTS)
    assert set(names[1:15]) == set(REFERENCE_TABLE)
    assert names[15:] == ["Ulysses-2-TP-4 + cache", "Ulysses-4-TP-2 + cache"]
    for steps, mask in MASKS.items():
        assert len(mask) == len(eight_gpus.mask_of(steps)) == steps
        assert parse_cache(cache_of(mask))


def row_of(layout, side, ms, *, cached=False, **figures):
    runs = {"28": [ms] * 28, "50": [ms] * 50}
    return {
        "layout": layout, "cached": cached, "side": side, "run_ms": runs, "text_s": 0.5, "peak_bytes": 2**30,
        "finite": True, "device": "a GPU", "relative_error": 1e-3, **figures,
    }  # fmt: skip


def test_a_line_of_the_reference_table():
    rows = [row_of("single", "ours", 400.0), row_of("TP-2", "ours", 200.0), row_of("TP-2", "cache-dit", 250.0)]
    rows += [{"layout": "Ring-2", "cached": False, "side": "cache-dit", "failed": "RuntimeError: no"}]
    said = eight_gpus.to_markdown(rows, [Row("single"), Row("TP-2"), Row("Ring-2")], [28, 50]).splitlines()
    single, tp, ring = ([cell.strip() for cell in line.split("|")[1:-1]] for line in said[2:])
    assert len(single) == len(tp) == len(ring) == len(said[0].split("|")[1:-1])
    assert tp[:7] == ["TP-2", "6.10", "7.50", "0.813", "10.50", "13.00", "0.808"]
    assert tp[7:11] == ["200.0", "250.0", "0.800", "2.00"]
    assert tp[11:] == ["1.00", "1.00", "1.0e-03", "1.0e-03", ""]
    assert ring[-1] == "cache-dit: RuntimeError: no"
    assert not any(ring[1:-1])


def test_a_table_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """Rows that are there are not measured again, those that failed are, and one GPU's always: others need it."""
    file, wanted = tmp_path / "rows.json", rows_of("tiny", 2)
    asked = []

    def run_job(task, side, rows, arguments, until):
        asked.extend((side, row.name) for row in rows)
        (arguments.folder / "prediction.pt").touch()
        return [row_of(row.layout, side, 1.0) for row in rows]

    monkeypatch.setattr(eight_gpus, "run_job", run_job)
    monkeypatch.setattr("sys.argv", ["eight_gpus.py", "--shape", "tiny", "--device", "cpu", "--gpus", "2", "--json",
                                     str(file)])  # fmt: skip
    eight_gpus.main()
    assert set(asked) == {(side, row.name) for side in ("ours", "cache-dit") for row in wanted}
    asked.clear()
    eight_gpus.main()
    assert not asked
    said = json.loads(file.read_text())
    said["rows"][-1] = {"layout": "Ring-2", "cached": False, "side": "cache-dit", "failed": "it did"}
    file.write_text(json.dumps(said))
    eight_gpus.main()
    assert asked == [("ours", "single"), ("cache-dit", "Ring-2")]


def test_kinds_of_operators_on_the_cpu():
    names = ["aten::addmm", "aten::_scaled_dot_product_flash_attention_for_cpu", "gloo:all_to_all", "aten::mul"]
    assert [Work(name, 0, 1).kind for name in names] == ["GEMM", "attention", "communication", "rest"]


def test_union_joins_what_overlaps_or_touches():
    assert union([(5, 6), (0, 2), (1, 3), (3, 4)]) == [(0, 4), (5, 6)]


@pytest.mark.parametrize("degree", [2, 4])
def test_shards_are_slices_of_the_whole_models_weights(degree):
    family, config = transformer_config(TINY)
    whole = family.transformer.build(config)
    fill(whole, torch.device("cpu"), torch.float32)
    full = dict(whole.named_parameters())
    for rank in range(degree):
        shard = family.transformer.build(config)
        table = apply_tensor_parallel(shard, family.transformer.plan(dict(shard.config)), Axis(None, degree, rank))
        fill(shard, torch.device("cpu"), torch.float32, table)
        for name, parameter in shard.named_parameters():
            expected = table[name].take(full[name]) if name in table else full[name]
            assert torch.equal(parameter, expected), name


@pytest.mark.parametrize(
    "name", [name if name in FEW else pytest.param(name, marks=pytest.mark.thorough) for name in SHAPES]
)
def test_shapes_are_of_models_that_run(name):
    shape = SHAPES[name]
    family, config = transformer_config(shape)
    model = family.transformer.build(config)
    assert family.transformer.context_width(dict(model.config)) == shape.features
    # Counted by running it on the meta device.
    work = count_workload(family, config, 128, 128, 16)
    assert work.attentions == sum(len(getattr(model, stack.attribute)) for stack in family.transformer.block_stacks)


def test_klein_has_its_4_billion_weights():
    family, config = transformer_config(SHAPES["klein-4b"])
    assert sum(p.numel() for p in family.transformer.build(config).parameters()) == pytest.approx(3.9e9, rel=0.03)


def test_an_unknown_shape_is_refused_with_those_that_there_are():
    with pytest.raises(
        ValueError, match=r"no shape 'flux3' .* flux2-dev, qwen-image, klein-4b, wan-14b, wan-14b-i2v, wan-5b, tiny"
    ):
        shape_of("flux3")


@pytest.mark.parametrize("degrees", [(2, 1, 1), (1, 3, 1), (1, 1, 4), (2, 2, 2)], ids=str)
def test_a_rank_that_is_alone_computes_finite_values(degrees):
    layout = ParallelismConfig(*degrees)
    start_alone(layout.world_size)
    try:
        mesh = build_mesh(layout, "cpu")
        model = build_transformer(TINY, layout, mesh, torch.bfloat16)
        x, inputs = make_inputs(TINY, 128, 128, 50, "cpu", torch.bfloat16)  # tokens that do not divide by 3
        with torch.no_grad():
            out = transformer_config(TINY)[0].transformer.prediction(model(**inputs, return_dict=False)[0], x)
    finally:
        dist.destroy_process_group()
    assert out.shape == x.shape
    assert out.isfinite().all()


def test_layouts_by_name():
    for degrees in [(1, 1, 1), (4, 1, 2), (2, 2, 2), (1, 8, 1), (1, 1, 4)]:
        layout = ParallelismConfig(*degrees)
        assert layout_of(layout.name) == layout
    with pytest.raises(ValueError, match="names no layout"):
        layout_of("Ulysses2")


def row(side, ms, **more):
    profile = shares([Work("nvjet", 0, ms - 1), Work("add", ms - 1, ms)], ms)
    good = {"step_ms": [ms, ms + 2, ms + 1], "profile": profile, "peak_bytes": 2**30, "weight_bytes": 2**29}
    return {"layout": "TP-2", "side": side, "finite": 1.0, "first_step_s": 3.0, **good, **more}


def test_the_table_has_medians_spreads_and_ratios():
    table = to_markdown([row("ours", 90.0), row("cache-dit", 100.0), row("ours", 94.0)]).splitlines()
    assert table[2].startswith("| TP-2 | ours | 93.0 (90.0 to 96.0) | 93.0 + 0.0 + 0.0 + 1.0 = 94.0 |")
    assert table[4].startswith(f"| TP-2 | ratio | {93 / 101:.3f} |")


def test_a_run_with_a_mask_counts_as_a_whole():
    rows = [
        row("ours", 90.0) | {"step_ms": [90.0, 80.0, 10.0]},
        row("cache-dit", 100.0) | {"step_ms": [100.0, 90.0, 20.0]},
    ]
    table = to_markdown(rows, "110").splitlines()
    assert table[2].startswith("| TP-2 | ours | 60.0 | ")
    assert table[2].endswith(" 2 computed: 85.0 ms, 1 cached: 10.0 ms |")
    assert table[4].startswith(f"| TP-2 | ratio | {60 / 70:.3f} |")


def test_the_table_says_why_a_side_has_no_figures():
    rows = [row("ours", 90.0), {"layout": "TP-2", "side": "cache-dit", "error": "ValueError: no"}]
    table = to_markdown(rows).splitlines()
    assert table[3].endswith("| ValueError: no |")
    assert len(table) == 4


def test_a_task_knows_its_layout():
    task = Task("tiny", 2, 1, 4, 128, 128, 3, "cpu", "float32", 64)
    assert task.layout == ParallelismConfig(ulysses_size=2, tp_size=4)


def test_what_moved_for_neighbours():
    """As the server's log has it, in each picture."""
    log = (
        "got prompt\nworkers: 16.2 GiB a rank of the transformer of neighbours_transformer.safetensors moved to host "
        "memory as ComfyUI asked for memory\nComfyUI has 1.3 GiB of GPU 0 from the workers, of 2.7 asked for\n"
        "workers: 10.9 GiB a rank of the text encoder of t.safetensors unloaded to make room for the transformer\n"
    )
    said = neighbours.moves(log)
    assert said == [
        "16.2 GiB a rank of the transformer of neighbours_transformer.safetensors moved to host memory",
        "ComfyUI has 1.3 GiB of GPU",
        "10.9 GiB a rank of the text encoder of t.safetensors unloaded",
    ]
    pictures = [
        {"seconds": 3.0, "moves": said[1:2], "tiled": False},
        {"seconds": 1.5, "moves": [], "tiled": False},
        {"seconds": 1.5, "moves": [], "tiled": True},
    ]
    ours = {"name": "ours --reserve-vram 2", "pictures": pictures}
    assert neighbours.line(ours) == (
        "| ours --reserve-vram 2 | 3.00, 1.50, 1.50 | 1: ComfyUI has 1.3 GiB of GPU, 3: tiled decoding | - |"
    )
    failed = {"name": "ours", "pictures": [], "error": "ServerDied: it ended\nwith a log\nValueError: no"}
    assert neighbours.line(failed) == "| ours | - | none | ServerDied: it ended ... ValueError: no |"
    stock = {"name": "stock --reserve-vram 2", "pictures": [{**picture, "seconds": 1.0} for picture in pictures]}
    rows = {row["name"]: row for row in (ours, stock, failed, {**failed, "name": "stock"})}
    assert neighbours.compared(rows) == [
        "--reserve-vram 2: 1.50 s a picture, stock 1.00 s: 1.50 times (ABOVE 1.10); moves after the second picture: 0"
    ]


def quantized_rows(monkeypatch, capsys, tmp_path, failing, *arguments):
    """What `benchmarks/quantized_speed.py` has its processes measure, those of a list of rows failing, and says."""
    asked = []

    def in_ranks(arguments, task, rows, seconds, tell):
        asked.append([(row["model"], row["weights"], row["how"]) for row in rows])
        for count, row in enumerate(rows, 1):
            ms = {"bf16": 100.0, "nvfp4": 150.0}.get(row["weights"], 75.0)
            spread = {"median": ms, "least": ms, "most": ms}
            figures = {"ms": spread, "peak_bytes": 2**30, "weight_bytes": 2**29, "held": "8 int8 (units)", "first_s": 1}
            bad = (row["weights"], row["how"]) in failing
            tell(row | ({"failed": "OutOfMemoryError: no"} if bad else figures))
            if bad:
                return count
        return len(rows)

    monkeypatch.setattr(quantized_speed, "in_ranks", in_ranks)
    command = ["x", "--shape", "tiny", "--devices", "cpu", "--json", str(tmp_path / "a.json"), *arguments]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as ended:
        quantized_speed.main()
    return asked, ended.value.code, capsys.readouterr()


def test_a_row_that_fails_costs_no_other_and_is_measured_again(monkeypatch, capsys, tmp_path):
    bad = [("int8", "eager"), ("nvfp4", "eager")]
    asked, code, said = quantized_rows(monkeypatch, capsys, tmp_path, bad, "--weights", "int8", "--how", "eager")
    assert code == 1
    assert [len(rows) for rows in asked] == [4, 2]
    assert "transformer   int8            eager     failed: OutOfMemoryError: no" in said.out
    asked, code, said = quantized_rows(monkeypatch, capsys, tmp_path, [], "--weights", "int8")
    assert code == 0
    assert asked == [[("transformer", "int8", "eager"), ("text encoder", "nvfp4", "eager"),
                      ("transformer", "bf16", "compiled"), ("transformer", "int8", "compiled")]]  # fmt: skip
    assert "text encoder  nvfp4           eager     150.0 (150.0 to 150.0) ms  1.500 x bf16 peak 1.00 GiB" in said.out
    assert "bf16            eager     100.0 (100.0 to 100.0) ms  1.000 x bf16 peak 1.00 GiB" in said.out
    _, code, said = quantized_rows(monkeypatch, capsys, tmp_path, [], "--depth-fraction", "0.5")
    assert code == 2
    assert "of another measurement" in said.err
    _, code, said = quantized_rows(monkeypatch, capsys, tmp_path, [], "--weights", "int9")
    assert code == 2
    assert "there is no 'int9' to measure; there are: fp8" in said.err


def test_part_of_the_depth():
    shape = quantized_speed.shallower(SHAPES["flux2-dev"], 0.25)
    _, config = transformer_config(shape)
    assert (config["num_layers"], config["num_single_layers"], shape.side) == (2, 12, 1024)
    assert shape.text_config["text_encoder_out_layers"] == [2, 5, 8]
    assert shape.text_config["text_config"]["hidden_size"] == 5120


def wan_speed_rows(monkeypatch, capsys, tmp_path, failing, *arguments):
    """What `benchmarks/wan_speed.py` has its processes measure, rows of a list failing, and what it says."""
    asked = []

    def in_ranks(task, rows, devices, seconds):
        asked.append(list(rows))
        for row in rows:
            seen = {"peak_bytes": 2**30 // row.ranks, "weight_bytes": 2**29, "first_s": 1.0, "finite": True}
            ms = 100.0 * (0.6 if row.half else 1) * (1.25 if row.side == "diffusers" else 1) / row.ranks
            seen |= {"ms": {"median": ms, "least": ms, "most": ms}, "seconds": 0.3 if row.layout else 1.0}
            seen |= {"held": {"experts": 2**30}, "peaks": {"decoding": 2**31}}
            key = {name: getattr(row, name) for name in ("what", "size", "layout", "alone", "side", "half")}
            yield key | ({"failed": "OutOfMemoryError: no"} if row in failing else seen)
            if row in failing:
                return

    monkeypatch.setattr(wan_speed, "in_ranks", in_ranks)
    command = ["x", "--shape", "tiny", "--devices", "cpu", "--json", str(tmp_path / "a.json"), *arguments]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as ended:
        wan_speed.main()
    return asked, ended.value.code, capsys.readouterr()


def test_wans_benchmark_goes_on_after_a_row_that_fails(monkeypatch, capsys, tmp_path):
    bad = wan_rows.Row(wan_rows.STEP, "720p", "tp=4")
    asked, code, said = wan_speed_rows(monkeypatch, capsys, tmp_path, [bad])
    assert code == 1
    assert [len({row.ranks for row in rows}) for rows in asked] == [1] * len(asked)
    assert {row for rows in asked for row in rows} == set(wan_rows.rows_of(""))
    assert "step 720p tp=4, rank 0 alone, ours 8 blocks: failed: OutOfMemoryError: no" in said.out
    # 8 blocks take 100 ms and 4 take 60: 10 a block, and 20 beside.
    assert "x 40 blocks: 420 ms" in said.out
    assert "step 480p whole, diffusers 8 blocks: 125.0 (125.0 to 125.0) ms" in said.out
    assert "ours / diffusers 0.800" in said.out
    assert "VAE decode 720p rank 0 of 4, ours: 0.30 s, peak 1.00 GiB, 0.300 of one rank's time" in said.out
    assert "step 480p ulysses=8, rank 0 alone, ours 8 blocks: 12.5 (12.5 to 12.5) ms" in said.out
    assert "0.125 of one rank's" in said.out
    assert "memory 480p tp=2, rank 0 alone, ours: peak 0.50 GiB of weights experts 1.00" in said.out
    asked, code, _ = wan_speed_rows(monkeypatch, capsys, tmp_path, [])
    assert (asked, code) == ([[bad]], 0)
    asked, _, _ = wan_speed_rows(monkeypatch, capsys, tmp_path, [], "--layout", "cfg")
    assert [(row.layout, row.alone, row.side) for rows in asked for row in rows] == [("cfg", False, "ours")] * 2
    _, code, said = wan_speed_rows(monkeypatch, capsys, tmp_path, [], "--blocks", "4")
    assert code == 2
    assert "of another measurement" in said.err
    _, code, said = wan_speed_rows(monkeypatch, capsys, tmp_path, [], "--layout", "tp2")
    assert code == 2
    assert "a layout is like ulysses=2" in said.err


def test_wans_benchmark_measures_steps_of_both_sides_and_decoding():
    task = wan_rows.Task("tiny", 1, 1, "cpu", "native")
    ranks, predictions = wan_rows.Ranks(task), []
    shape = task.model(1)
    x, inputs = ranks._inputs(shape, "480p")
    ours = build_transformer(shape, ParallelismConfig(), build_mesh(ParallelismConfig(), "cpu"), torch.float32)
    theirs = ranks._theirs(wan_rows.Row(wan_rows.STEP, "480p", side="diffusers"), shape)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        predictions = [wan_rows.WAN.transformer.evaluate(ours, inputs, x), theirs(**inputs, return_dict=False)[0]]
    torch.testing.assert_close(*predictions, rtol=1e-4, atol=1e-4)
    work = []
    for layout in ("", wan_rows.OF_FOUR):
        with FlopCounterMode(display=False) as flops:
            assert ranks.measure(wan_rows.Row(wan_rows.VAE, "480p", layout))["seconds"] > 0
        work.append(flops.get_total_flops())
    assert 0 < work[1] < 0.5 * work[0]


def test_rows_of_a_lora_are_kept_and_those_that_fail_are_tried_again(tmp_path, capsys):
    figures = dict.fromkeys(("file_gib", "on_s", "read_s", "strength_s", "off_s", "on_again_s", "step_percent"), 1.0)
    figures |= {"plain_step_s": 0.2, "step_s": 0.21}
    asked, kept = [], tmp_path / "rows.json"

    def measure(what):
        asked.append(what)
        if what == "rank 64" and len(asked) < 4:
            raise RuntimeError("a rank ended")
        return {"host_mib": [1.0], "gpu_mib": [2.0]} if what == "cycles" else dict(figures)

    names, labels = lora.names_of("fp8", [16, 64]), {"layout": "TP-2", "form": "fp8"}
    lora.measure_all(names, measure, labels, kept)
    assert asked == ["rank 16", "rank 64", "cycles"]
    assert "TP-2, fp8, rank 64: failed: RuntimeError: a rank ended" in capsys.readouterr().out
    rows = lora.measure_all(names, measure, labels, kept)
    assert asked[3:] == ["rank 64"]
    assert "rank 64 (1.00 GiB): on 1.00 s" in capsys.readouterr().out
    assert not any("error" in row for row in rows)
    lora.measure_all(names, measure, {**labels, "form": "bf16"}, kept)
    assert asked[4:] == names
