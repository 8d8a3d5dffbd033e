"""What using a worker group may raise beside ValueError, which says that the request was at fault."""

from __future__ import annotations

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
