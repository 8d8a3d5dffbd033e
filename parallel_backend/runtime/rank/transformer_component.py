"""The transformer of a model as one rank holds it: its shards, its block cache and its adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ...cache.block_cache import BlockCache
from ...families import Model
from ...loading.adapters import NO_ADAPTERS, AdapterSet
from ...loading.text_encoder_file import TextEncoderFile
from ...loading.vae_file import VaeFile
from ...loading.weight_loader import load_weights
from ...mesh import raise_together
from ...parallel.tensor import ParamShard
from ...parallelize import forget_graphs, parallelize_transformer
from ...planning.memory import transformer_activation_bytes
from .adapted_weights import AdaptedWeights
from .component import Component


class TransformerComponent(Component):
    """The transformer: sharded over tp, the same on all ranks of cp."""

    name = "transformer"
    adapters = NO_ADAPTERS
    """What the weights are changed by."""
    merged: frozenset[str] = frozenset()
    """Parameters that are not as the file has them."""
    beside = 0
    """Bytes that stand beside weights in 8 bits; they count among `nbytes`."""

    def build(self) -> tuple[Model, Mapping[str, ParamShard]]:
        settings = self.settings
        assert not isinstance(settings.source, TextEncoderFile | VaeFile)
        self.config, self.replicas = settings.source.transformer_config, settings.mesh.cp
        kind = settings.family.transformer
        module = kind.build(self.config)
        table = parallelize_transformer(module, kind, settings.layout, settings.mesh, settings.speed)
        self.table = table
        self.cache = BlockCache(module, kind.block_stacks, settings.mesh.world, kind.picture_tokens)
        return module, table

    def to_host(self) -> None:
        forget_graphs(self.module)  # which know where the weights were
        for run in self.cache.runs():
            self.cache.forget(run)
        super().to_host()

    def drop(self) -> None:
        self.__dict__.pop("cache", None)  # it holds the module; the next build makes another
        super().drop()

    def load(self, on_bytes: Callable[[int], None]) -> None:
        super().load(on_bytes)
        adapters, self.adapters, self.merged = self.adapters, NO_ADAPTERS, frozenset()
        self.beside = 0
        self.adapt(adapters)

    def adapt(self, adapters: AdapterSet, make_room: Callable[[int], object] = lambda size: None) -> None:
        """Have the weights be those of the file with a set of patches, and with no others. Collective.

        Plain weights are patched in place, and read again from the file before other patches; beside those that stay in
        8 bits stands a product of two thin matrices. The weights stay where they are, so compiled code and CUDA graphs
        stay valid.

        Args:
            adapters: the set.
            make_room: for so many bytes beside the weights; collective.

        Raises:
            ValueError: a patch that these weights cannot have, before anything is changed; or the file cannot be read
                again, and which weights there are is not known until a set is applied.
        """
        if adapters.name == self.adapters.name:
            return
        settings = self.settings
        weights = AdaptedWeights(self.module, settings.family.transformer, self.table, settings.dtype)
        error: Exception | None = None
        try:
            weights.check(adapters)
        except ValueError as found:
            error = found
        raise_together(error, settings.mesh.world)
        beside = weights.beside_bytes(adapters)
        make_room(beside)
        again, now = self.merged, weights.merged(adapters)
        self.merged, self.adapters = again | now, AdapterSet("unknown")
        self.host = None  # has other weights
        try:
            if again:
                load_weights(
                    self.module, self._weights, self.table, device=settings.device, dtype=settings.dtype,
                    replicas=self.replicas, fp8=settings.fp8, again=again,
                )  # fmt: skip
            weights.apply(adapters)
        except ValueError as found:
            error = found
        raise_together(error, settings.mesh.world)
        self.merged, self.adapters = now, adapters
        self.nbytes, self.beside = self.nbytes + beside - self.beside, beside
        forget_graphs(self.module)  # those of linears that had nothing beside them before

    def workspace(self, tokens: int) -> int:
        """About the bytes that an evaluation over so many tokens (of the batch, in full) takes beside the weights."""
        settings = self.settings
        return transformer_activation_bytes(
            settings.family, self.config, settings.layout, tokens, settings.dtype.itemsize
        )

    def residual_bytes(self, tokens: int, order: int) -> int:
        """At most the bytes that this rank's cache needs for a conditioning of so many tokens, with TaylorSeer's order.

        The first blocks' residual, the derivatives, and the new ones while the old are still there.
        """
        width = self.settings.family.transformer.width(self.config)
        local = -(-tokens // self.settings.layout.cp_size)
        return (1 + 2 * (order + 1)) * local * width * self.settings.dtype.itemsize
