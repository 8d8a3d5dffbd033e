"""What is raised and said where ranks failed a request, or did not answer it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from ...planning.memory import GIB
from ..errors import OutOfMemoryError, RequestFailedError, WorkersFailedError, out_of_reach
from ..wire.messages import Failed

FRESH = "The workers were stopped; the next run starts a fresh group."

BROKEN = (
    "No work is possible there for the process that had it. 'auto' leaves a GPU that is gone out until "
    "ComfyUI is started again. Where the same GPU fails again, name others in the layout's 'devices', and look at what "
    "'dmesg' says of it (Xid)."
)


def failure(
    failures: Sequence[Failed], ranks: int, log_of: Callable[[int], str], several_hosts: bool = False
) -> tuple[Exception, bool]:
    """What the failures of some ranks amount to: the first that ran out of memory, or else the first.

    Args:
        failures: of one request, one a rank.
        ranks: of the group; those that have not failed have answered where all failures were ``alone``, else they may
            be waiting for the others in a collective.
        log_of: where the log of a rank is.
        several_hosts: whether the ranks are on several hosts.

    Returns:
        The error, and whether the group is as good as before; the error's text says so too.
    """
    if unreached := [failed for failed in failures if failed.axis]:
        text = f"{_out_of_reach(unreached)}. {out_of_reach([f.device for f in unreached], several_hosts)}"
        return WorkersFailedError(f"{text}\n(log: {log_of(unreached[0].rank)})\n{FRESH}"), False
    if broken := [failed for failed in failures if failed.device_failed]:
        first = min(broken, key=lambda failed: failed.rank)
        text = f"{first.device} of rank {first.rank} failed: {first.error}\n{BROKEN}"
        return WorkersFailedError(f"{text}\n(log: {log_of(first.rank)})\n{FRESH}\n{first.traceback}"), False
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


def _out_of_reach(failures: Sequence[Failed]) -> str:
    """Which ranks do not reach each other, of those that waited in vain."""
    devices = {failed.rank: f"rank {failed.rank} ({failed.device})" for failed in failures}
    told = {failed.rank: failed for failed in failures}

    def mutual(failed: Failed, other: int) -> bool:
        # Who waits for a rank that waits for yet another one has no part in the fault.
        back = told.get(other)
        return back is None or (failed.rank in back.unreached and failed.axis == back.axis)

    pairs = sorted({tuple(sorted((f.rank, other))) for f in failures for other in f.unreached if mutual(f, other)})
    ranks = sorted({rank for pair in pairs for rank in pair} or devices.keys())
    names = [devices.get(rank, f"rank {rank}") for rank in ranks]
    first = min(failures, key=lambda failed: (failed.rank not in ranks, failed.rank))
    how = f"did not reach each other within {first.seconds:.0f} s" if first.seconds else "get other data than was sent"
    return (
        f"{', '.join(names[:-1])} and {names[-1]} {how}, on the axis {first.axis}"
        if names[1:]
        else (f"{names[0]} does not reach rank {_listed(first.unreached)}, on the axis {first.axis}")
    )


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
