"""A module of a model whose weights a graph may patch: LoRA and the like, on this rank's slices."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping

from ...loading.adapted_weights import AdaptedWeights
from ...loading.adapters import NO_ADAPTERS, AdapterSet
from ...loading.weight_loader import load_weights
from ...mesh import SINGLE, Axis, raise_together
from ...parallel.tensor import ParamShard
from .component import Component


class AdaptableComponent(Component):
    """A `Component` that may have a set of patches on."""

    table: Mapping[str, ParamShard]
    """The slices that this rank holds of what is sharded; `build` sets it."""
    adapters = NO_ADAPTERS
    """What the weights are changed by."""
    patched: AdaptedWeights | None = None
    """The weights that are there, and what is on."""
    beside = 0
    """Bytes that stand beside weights or in their place; they count among `nbytes`."""
    shards: Axis = SINGLE
    """Ranks among which weights are split."""

    @abstractmethod
    def file_rows(self, name: str) -> tuple[tuple[str, int, int], ...]:
        """What makes a parameter, by the names that patches use; as `Transformer.file_rows`."""

    def on_new_weights(self, moved: bool) -> None:
        """Weights have changed; ``moved``: something stands beside some that had nothing there, or not any more."""

    def load(self, on_bytes: Callable[[int], None]) -> None:
        super().load(on_bytes)
        adapters, self.adapters, self.beside = self.adapters, NO_ADAPTERS, 0
        settings = self.settings
        self.patched = AdaptedWeights(self.module, self.file_rows, self.table, self.shards, settings.dtype)
        try:
            self.adapt(adapters)
        except BaseException:
            self.drop()  # the next use loads it again, with the patches
            self.adapters = adapters
            raise

    def drop(self) -> None:
        self.patched = None
        super().drop()

    def adapt(self, adapters: AdapterSet, make_room: Callable[[int], object] = lambda size: None) -> None:
        """Have the weights be those of the file with a set of patches, and with no others. Collective.

        Plain weights are patched in place, and read again from the file before other patches. Those that are stored in
        other formats stay as they are: beside them stands a product of two thin matrices, of which a change of strength
        or a LoRA of about that rank changes the values alone, or in their place a plain weight. What is switched within
        a run stands beside plain weights, too. Where no memory is taken or given back, compiled code and CUDA graphs
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
        settings, weights = self.settings, self.patched
        assert weights is not None
        error: Exception | None = None
        try:
            weights.check(adapters)
        except ValueError as found:
            error = found
        raise_together(error, settings.mesh.world)
        beside, changed = weights.beside_bytes(adapters), weights.changed(adapters)
        make_room(max(0, beside - self.beside) + weights.working_bytes(adapters, changed))
        self.adapters = AdapterSet("unknown")
        self.host = None  # has other weights
        again = weights.again(changed)
        try:
            try:
                if again:
                    load_weights(
                        self.module, self._weights, self.table, device=settings.device, dtype=settings.dtype,
                        replicas=self.replicas, fp8=settings.fp8, again=again,
                    )  # fmt: skip
            except ValueError as found:
                error = found
            raise_together(error, settings.mesh.world)
            moved = weights.apply(adapters, changed)
        except BaseException:
            weights.lose_track(changed)
            raise
        self.adapters = adapters
        self.nbytes, self.beside = self.nbytes + beside - self.beside, beside
        self.on_new_weights(moved)
