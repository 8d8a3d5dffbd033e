"""What is on a rank's device: which component was used when, and which ones make way for the next."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from ...cache.block_cache import BlockCache
from .byte_counter import ByteCounter, OnProgress
from .component import Component, Place
from .eviction import Eviction
from .transformer_component import TransformerComponent


class Residents:
    """The components of all models of this rank. Every rank is asked for the same things in the same order.

    Args:
        eviction: frees memory on all ranks.
        on_progress: told of the reading of components that come back.
    """

    def __init__(self, eviction: Eviction, on_progress: OnProgress = lambda *_: None) -> None:
        self.eviction, self.on_progress = eviction, on_progress
        self.orphans: set[str] = set()
        """Names of models that nobody refers to any more: theirs leave first, and for good."""
        self.used: OrderedDict[tuple[str, str], Component] = OrderedDict()
        """By names of model and component, the least recently used first."""
        self.granted: tuple[Component | None, int, int] = (None, 0, 0)
        """What was used last, the size of work that room was made for, and bytes that the fullest device lacked."""

    def make_room_anew(self) -> None:
        """What was found out about room does not hold any more."""
        self.granted = (None, 0, 0)

    def remove(self, name: str) -> None:
        """A model is gone."""
        for key in [key for key in self.used if key[0] == name]:
            del self.used[key]
        self.make_room_anew()

    def bring(self, name: str, component: Component, size: int, run: str = "", divisible: bool = False) -> int:
        """Have a component on the device, with room for work of a size (tokens or pixels) in a run. Collective.

        Nothing is to be done for the one that was used last, unless the work is larger, or ``divisible`` and there was
        too little room last time.

        Returns:
            Bytes that the fullest device lacks for that work.
        """
        latest, granted, missing = self.granted
        self.used[name, component.name] = component
        self.used.move_to_end((name, component.name))
        is_there = component.place is Place.DEVICE
        if component is latest and is_there and size <= granted and not (missing and divisible):
            return missing
        weights = component.lent_bytes if is_there else component.nbytes
        missing = self.make_room(component, weights, component.workspace(size), run)
        if component.place is Place.HOST or component.away:
            component.to_device()
        elif component.place is Place.FILE:
            component.load(ByteCounter(component.nbytes, self.on_progress).add)
        self.granted = (component, size, missing)
        return missing

    def make_room(
        self, component: Component, weights: int, workspace: int, run: str = "", needs_step: bool = True
    ) -> int:
        """Have what caches keep of other runs leave, then other components. Collective.

        Those of orphans leave first, then the least recently used. Transformers leave only if a step needs the room;
        two that take turns would else push each other out. What is returned and raised is `Eviction.make`'s.
        """
        for cache, other_run in self._runs_beside(run):
            if self.eviction.has(weights + workspace):
                break
            cache.forget(other_run)
        others = [(other, name in self.orphans) for (name, _), other in self.used.items() if other is not component]
        others = [pair for pair in others if needs_step or pair[1] or not isinstance(pair[0], TransformerComponent)]
        others.sort(key=lambda pair: not pair[1])
        return self.eviction.make(weights, workspace, f"the {component.label}", others)

    def lend(self, size: int, ranks: Sequence[int]) -> tuple[int, int, dict[tuple[str, str], int]]:
        """Free device memory of some ranks for others, with the least that helps. Collective.

        First goes what the allocator keeps, then what CUDA graphs keep, then weights, tensor by tensor: of models that
        nobody refers to, of text encoders and VAEs, and of transformers, each the least recently used first. The next
        use brings back what moved.

        Args:
            size: bytes.
            ranks: whose devices.

        Returns:
            Bytes that were freed here; of weights that are left on this rank's device; and of weights that it has to
            bring back, of which component.
        """
        eviction, here = self.eviction, self.eviction.axis.rank in ranks
        self.make_room_anew()
        freed = 0
        if here and eviction.held is not None:
            before = eviction.held()
            eviction.trim()
            freed = before - eviction.held()
        # Graphs have exchanges in them: the others of all ranks have to go with them.
        if eviction.held is not None and eviction.most(size - freed if here else 0) > 0:
            for component in self.used.values():
                if component.place is Place.DEVICE:
                    component.forget_workspace()
            before = eviction.held()
            eviction.trim()
            freed += before - eviction.held()

            def last(key: tuple[str, str]) -> tuple[bool, bool]:
                return key[0] not in self.orphans, isinstance(self.used[key], TransformerComponent)

            for key in sorted(self.used, key=last) if here else ():
                if freed >= size:
                    break
                freed += eviction.lend(size - freed, self.used[key])
        left = sum(part.nbytes - part.lent_bytes for part in self.used.values() if part.place is Place.DEVICE)
        return freed, left, {key: part.lent_bytes for key, part in self.used.items() if part.away}

    def _runs_beside(self, run: str) -> list[tuple[BlockCache, str]]:
        """All runs but one of which caches keep something, those of the least recently used model first."""
        there = [one for one in self.used.values() if isinstance(one, TransformerComponent)]
        caches = [one.cache for one in there if one.place is not Place.FILE]
        return [(cache, other) for cache in caches for other in cache.runs() if other != run]
