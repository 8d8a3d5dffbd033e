"""The transformer of a model as one rank holds it: its shards, its block cache and its adapters."""

from __future__ import annotations

from collections.abc import Mapping

from ...cache.block_cache import BlockCache
from ...families import Model
from ...loading.quantized_weight import column_unit
from ...loading.text_encoder_file import TextEncoderFile
from ...loading.vae_file import VaeFile
from ...parallel.tensor import ParamShard
from ...parallelize import forget_graphs, forget_values, parallelize_transformer
from ...planning.memory import transformer_activation_bytes
from .adaptable_component import AdaptableComponent


class TransformerComponent(AdaptableComponent):
    """The transformer: sharded over tp, the same on all ranks of cp."""

    name = "transformer"

    def build(self) -> tuple[Model, Mapping[str, ParamShard]]:
        settings = self.settings
        assert not isinstance(settings.source, TextEncoderFile | VaeFile)
        self.config, self.replicas = settings.source.transformer_config, settings.mesh.cp
        self.shards = settings.mesh.tp
        kind = settings.family.transformer
        module = kind.build(self.config)
        table = parallelize_transformer(
            module, kind, settings.layout, settings.mesh, settings.speed, column_unit(self._weights.values())
        )
        self.table = table
        self.cache = BlockCache(module, kind.block_stacks, settings.mesh.world, kind.picture_tokens)
        return module, table

    def to_host(self) -> None:
        forget_graphs(self.module)  # which know where the weights were
        forget_values(self.module)
        for run in self.cache.runs():
            self.cache.forget(run)
        super().to_host()

    def forget_workspace(self) -> None:
        forget_graphs(self.module)
        forget_values(self.module)

    def drop(self) -> None:
        self.__dict__.pop("cache", None)  # it holds the module; the next build makes another
        super().drop()

    def file_rows(self, name: str) -> tuple[tuple[str, int, int], ...]:
        return self.settings.family.transformer.file_rows(name)

    def on_new_weights(self, moved: bool) -> None:
        forget_values(self.module)
        if moved:
            forget_graphs(self.module)

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
