"""What using a worker group may raise beside ValueError, which says that the request was at fault."""

from __future__ import annotations

from collections.abc import Sequence

_SHOWN_AS = "builtins"
"""ComfyUI and Python put the module's name before a text that users read, and leave out this one's."""


class WorkersFailedError(RuntimeError):
    """The group is gone; the next use starts a fresh one."""

    __module__ = _SHOWN_AS


class RequestFailedError(RuntimeError):
    """The ranks failed to carry out a request, all at the same place or alone; the group is as good as before."""

    __module__ = _SHOWN_AS


class OutOfMemoryError(WorkersFailedError, RequestFailedError):
    """A rank ran out of memory; the text says whether the group is gone.

    Args:
        text: what happened.
        details: what is less important, at the end.
        usable: whether the group is as good as before.
    """

    __module__ = _SHOWN_AS

    def __init__(self, text: str, details: str = "", usable: bool = False) -> None:
        super().__init__(text + details)
        self.usable = usable
        self._text, self._details = text, details

    def with_advice(self, advice: str) -> OutOfMemoryError:
        """The same, and what to do about it."""
        return OutOfMemoryError(f"{self._text}\n{advice}", self._details, self.usable)


class BatchTooLargeError(ValueError):
    """A batch that can be divided does not fit beside the weights on some device; nothing was computed."""


def out_of_reach(devices: Sequence[str], several_hosts: bool) -> str:
    """What to try where ranks do not reach each other.

    Args:
        devices: theirs, as ranks describe them.
        several_hosts: whether the ranks are on several hosts.
    """
    remedies = []
    if any(device.startswith("GPU") for device in devices):
        remedies += [
            "start ComfyUI with NCCL_P2P_DISABLE=1, so that exchanges go over host memory (with it, set copy_engines "
            "to false and the layout by hand)",
            "turn the IOMMU off, or PCIe ACS, in the BIOS or for this virtual machine",
            "update the driver ('nvidia-smi topo -p2p r' shows which GPUs reach each other, 'dmesg' what went wrong)",
            "name other GPUs in the layout's 'devices'",
        ]
    if several_hosts:
        remedies += ["let all ports through between the hosts", "on networks without InfiniBand set NCCL_IB_DISABLE=1"]
    return "What would help: " + "; or ".join(remedies or ["see what else keeps this machine busy"])
