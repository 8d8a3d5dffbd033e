"""A text encoder in one file on every layout: transformers' context, and copies that share the reading."""

import pytest

from parallel_backend import ParallelismConfig
from tests.distributed import text_file_cases
from tests.text_encoder_file import write_text

TOLERANCE = 1e-5
"""fp32: the layouts only reorder sums; 1e-6 was seen, a layer too many or a wrong rotation costs more than 1e-2."""
ULYSSES_2_TP_2 = ParallelismConfig(ulysses_size=2, tp_size=2)
USP_2_2_TP_2 = ParallelismConfig(ulysses_size=2, ring_size=2, tp_size=2)


@pytest.mark.parametrize(
    ("layout", "size", "degree"),
    [
        (ParallelismConfig(), {}, 1),
        (ParallelismConfig(tp_size=2), {"layers": 40}, 2),
        (ULYSSES_2_TP_2, {"kv_heads": 1}, 4),
        # Copies: of four quarters, which makes process groups, as all ranks of a job (here 8) have to do together; and
        # of the whole.
        (USP_2_2_TP_2, {"heads": 4, "kv_heads": 1}, 4),
        (ParallelismConfig(ring_size=4), {"heads": 3, "kv_heads": 1}, 2),
        (ParallelismConfig(ring_size=4), {"heads": 1, "kv_heads": 1}, 1),
    ],
    ids=["one rank", "TP-2", "4 ranks, one kv head", "2 copies over 4", "2 copies, 2 and 1 heads", "4 whole copies"],
)
def test_the_context_is_transformers_and_copies_share_the_reading(world, tmp_path, layout, size, degree):
    path = str(write_text(tmp_path / "mistral.safetensors", **size))
    results = world.run(text_file_cases.encode, layout, path)
    copies = layout.world_size // degree
    for result in results:
        assert result["error"] <= TOLERANCE
        assert (result["degree"], result["copies"]) == (degree, copies)
    for shard in range(degree):
        # Groups of adjacent ranks hold one copy each.
        same = results[shard::degree]
        assert len(same) == copies
        (held,) = {result["held"] for result in same}
        assert sum(result["read"] for result in same) == held  # each byte once, by one of them
        assert max(result["read"] for result in same) <= 1.5 * held / copies
