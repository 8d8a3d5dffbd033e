"""What a user chooses: degrees of parallelism, as a frozen dataclass that validates itself, and how blocks run.

Nothing here imports torch, so a wrong degree is refused before any process or device is touched.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MESH_AXES = ("ring", "ulysses", "tp")
"""Axes of the device mesh, outermost first: adjacent ranks share a tensor-parallel group."""


@dataclass(frozen=True)
class ParallelismConfig:
    """Degrees of hybrid parallelism; their product is the number of ranks ("world").

    Context parallelism (cp) shards the sequence over ``ring_size * ulysses_size`` ranks, tensor parallelism shards the
    weights over ``tp_size`` ranks.

    Args:
        ulysses_size: degree of Ulysses (DeepSpeed-Ulysses, arXiv:2309.14509): all-to-all from sequence to heads.
        ring_size: degree of Ring Attention (arXiv:2310.01889): keys and values travel around a ring.
        tp_size: degree of tensor parallelism (Megatron-LM, arXiv:1909.08053).
        extra_parallel_modules: modules (or names of pipeline components, such as ``"text_encoder"``) that are sharded
            over all ranks beside the transformer.
        parallel_kwargs: the same under the key ``"extra_parallel_modules"``, as cache-dit's users write it.

    Raises:
        ValueError: a degree that is not a whole number of at least 1, or an unknown key in ``parallel_kwargs``.
    """

    ulysses_size: int = 1
    ring_size: int = 1
    tp_size: int = 1
    extra_parallel_modules: tuple[Any, ...] = ()
    parallel_kwargs: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        # None means "not asked for", as it does for cache-dit's users.
        for name in ("ulysses_size", "ring_size", "tp_size"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, 1)
        bad = [
            name
            for name in ("ulysses_size", "ring_size", "tp_size")
            if not is_int(getattr(self, name)) or getattr(self, name) < 1
        ]
        if bad:
            raise ValueError(f"{' and '.join(bad)} must be a whole number of at least 1; got {self.describe()}")
        given = _as_list(self.extra_parallel_modules)
        for key, value in (self.parallel_kwargs or {}).items():
            if key != "extra_parallel_modules":
                raise ValueError(
                    f"unknown key {key!r} in parallel_kwargs; the one that is known is 'extra_parallel_modules'"
                )
            given += _as_list(value)
        extra: list[Any] = []
        for module in given:
            if not any(module is seen or (isinstance(module, str) and module == seen) for seen in extra):
                extra.append(module)
        object.__setattr__(self, "extra_parallel_modules", tuple(extra))

    @property
    def cp_size(self) -> int:
        """Number of ranks that the sequence is sharded over."""
        return self.ring_size * self.ulysses_size

    @property
    def world_size(self) -> int:
        """Number of ranks of the layout."""
        return self.cp_size * self.tp_size

    def describe(self) -> str:
        """Every degree and their product, for messages."""
        product = "?"
        degrees = (self.ulysses_size, self.ring_size, self.tp_size)
        if all(is_int(degree) for degree in degrees):
            product = str(self.ulysses_size * self.ring_size * self.tp_size)
        return (
            f"ulysses_size={self.ulysses_size!r}, ring_size={self.ring_size!r}, tp_size={self.tp_size!r} "
            f"(product {product})"
        )

    @property
    def name(self) -> str:
        """Short name as the field writes it: ``Ulysses-4-TP-2``, ``USP-2-2-TP-2``, ``single``."""
        parts = []
        if self.ulysses_size > 1 and self.ring_size > 1:
            parts.append(f"USP-{self.ulysses_size}-{self.ring_size}")
        elif self.ulysses_size > 1:
            parts.append(f"Ulysses-{self.ulysses_size}")
        elif self.ring_size > 1:
            parts.append(f"Ring-{self.ring_size}")
        if self.tp_size > 1:
            parts.append(f"TP-{self.tp_size}")
        return "-".join(parts) or "single"

    def check_world(self, world_size: int) -> None:
        """Raise ValueError unless the degrees multiply to ``world_size`` ranks."""
        if self.world_size != world_size:
            raise ValueError(
                f"{self.describe()} does not match the {world_size} available rank(s); "
                f"choose degrees whose product is {world_size}, or start {self.world_size} rank(s)"
            )

    def check_heads(self, heads: int, model: str) -> None:
        """Raise ValueError unless ``heads`` attention heads divide over tp x ulysses; names the degrees that would."""
        split = self.tp_size * self.ulysses_size
        if heads % split:
            fitting = [
                ParallelismConfig(u, self.world_size // (u * t), t).degrees()
                for t in _divisors(self.world_size)
                for u in _divisors(self.world_size // t)
                if heads % (t * u) == 0
            ]
            raise ValueError(
                f"{model} has {heads} attention heads, which do not divide by tp x ulysses = {split} "
                f"({self.describe()}); on {self.world_size} rank(s) these would work: {'; '.join(fitting)}"
            )

    def shrunk(self, ranks: int) -> ParallelismConfig:
        """The nearest degrees for another number of ranks: heads that divide by this layout's divide by theirs."""
        tp = math.gcd(self.tp_size, ranks)
        ulysses = math.gcd(self.ulysses_size, ranks // tp)
        return ParallelismConfig(ulysses, ranks // (tp * ulysses), tp)

    def degrees(self) -> str:
        """The degrees as they are typed in: ``ulysses 4, ring 1, tp 2``."""
        return f"ulysses {self.ulysses_size}, ring {self.ring_size}, tp {self.tp_size}"


@dataclass(frozen=True)
class Speed:
    """How the blocks of a model run; none of it changes what they compute beyond the order of sums.

    Args:
        compile: each kind of block as one graph of torch.compile, in which numbers of tokens are dynamic, so that
            other prompts and resolutions use the same one. The first forward takes a minute or so.
        cuda_graphs: all blocks of a forward as one CUDA graph, from the third forward of a size on. Worth it where the
            host holds up small models and small shards; the memory of the activations is then never given back.
        copy_engines: GPUs of one host that reach each other's memory exchange by copies, not by kernels of NCCL.
    """

    compile: bool = False
    cuda_graphs: bool = False
    copy_engines: bool = False

    def describe(self) -> str:
        """In words, such as ``compiled, CUDA graphs``."""
        parts = ["compiled" if self.compile else "eager"]
        return ", ".join(parts + ["CUDA graphs"] * self.cuda_graphs + ["copy engines"] * self.copy_engines)


AS_IT_IS = Speed()


def is_int(value: object) -> bool:
    """Whether a value is a whole number, which True is not."""
    return isinstance(value, int) and not isinstance(value, bool)


def _as_list(value: Any) -> list[Any]:
    """None as nothing, and one module or name that is not in a list as a list of it."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple, set, frozenset)) else [value]


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
