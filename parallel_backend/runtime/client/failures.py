"""What is raised and said where ranks failed a request, or did not answer it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from ...planning.memory import GIB
from ..errors import OutOfMemoryError, RequestFailedError, WorkersFailedError
from ..wire.messages import Failed

FRESH = "The workers were stopped; the next run starts a fresh group."


def failure(failures: Sequence[Failed], ranks: int, log_of: Callable[[int], str]) -> tuple[Exception, bool]:
    """What the failures of some ranks amount to: the first that ran out of memory, or else the first.

    Args:
        failures: of one request, one a rank.
        ranks: of the group; those that have not failed have answered where all failures were ``alone``, else they may
            be waiting for the others in a collective.
        log_of: where the log of a rank is.

    Returns:
        The error, and whether the group is as good as before; the error's text says so too.
    """
    all_failed = len(failures) == ranks
    alone = all(failed.alone for failed in failures)
    first = min(failures, key=lambda failed: (failed.out_of_memory is None, failed.bad_input, failed.rank))
    if (all_failed or alone) and all(failed.bad_input for failed in failures):
        return ValueError(first.error), True
    # Ranks that have not begun the same collectives would take each other's next messages for what they are not.
    begun = {failed.collectives for failed in failures}
    same_place = alone or (all_failed and (ranks == 1 or (len(begun) == 1 and None not in begun)))
    text = f"rank {first.rank} failed: {first.error}"
    if first.out_of_memory is not None:
        asked, free = (size / GIB for size in first.out_of_memory)
        wanted = f"{asked:.2f} GiB" if asked else "more"
        text = f"rank {first.rank} ran out of memory: it asked for {wanted} where {free:.2f} GiB were free"
    text += f"\n(log: {log_of(first.rank)})"
    details = f"\n{first.traceback}"
    if not same_place:
        text += f"\n{FRESH}"
    if first.out_of_memory is not None:
        return OutOfMemoryError(text, details, same_place), same_place
    return (RequestFailedError(text + details) if same_place else WorkersFailedError(text + details)), same_place


def silence(ranks: set[int], states: Mapping[int, str], limit: float) -> tuple[str, int]:
    """What is said of ranks that did not answer, and the one whose log to look into.

    Args:
        ranks: that did not answer.
        states: the letters that the system has for those of them on this machine.
        limit: seconds that were waited.
    """
    stopped = sorted(rank for rank, state in states.items() if state == "T")
    who = f"rank {_listed(ranks)} did not answer within {limit:.0f} s"
    if stopped:
        who = f"rank {_listed(stopped)} is stopped (SIGSTOP), and the group did not answer within {limit:.0f} s"
    where = "the logs say where each rank was" if len(states) > len(stopped) else "its log may say more"
    return f"{who}; {where}", min(stopped or ranks)


def _listed(ranks: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(ranks)))
