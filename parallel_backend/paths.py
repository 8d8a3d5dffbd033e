"""Where the project keeps files of its own on the user's machine.

Nothing that is there already is changed: a folder may be another program's, or another ComfyUI's.
"""

from __future__ import annotations

import contextlib
import errno
import getpass
import os
import re
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

HOME_VARIABLE = "HYBRID_DIT_HOME"
KEPT_LOGS = 10
"""Log folders of earlier groups that are kept."""
UNLOCKED_SECONDS = 7 * 24 * 3600.0
"""Where files cannot be locked, nobody can tell whether a group is running: its logs stay until they are so old."""
AGENT_LOG = "torchrun.log"
"""The first file in each folder of logs. It is locked as long as a process of the group is there (`hold`)."""
SOCKET_NAME = "control"
_OURS = re.compile(r"\d{8}-\d{6}-\w{8}")
_SOCKET_BYTES = 107
"""Of a path that a socket can be found at, on Linux."""


def home() -> Path:
    """``$HYBRID_DIT_HOME``, else ``~/.cache/hybrid-dit``, else, where that cannot be used, one for temporary files.

    Raises:
        ValueError: none of them can be written to, with the reason.
    """
    configured = os.environ.get(HOME_VARIABLE)
    if configured:
        try:
            return _usable(Path(configured).expanduser().absolute())
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"the folder {configured!r} of {HOME_VARIABLE} cannot be used ({_reason(error)}); set it to a folder "
                "that you can write to, or unset it"
            ) from None
    try:
        return _usable(default_home())
    except (OSError, RuntimeError) as error:
        reason = _reason(error)
    for folder in _temporary_folders():
        with contextlib.suppress(OSError):
            return _own_temporary(folder)
    raise ValueError(
        f"there is no place for logs: {reason}, and no folder for temporary files can be written to; set "
        f"{HOME_VARIABLE} to a folder that you can write to"
    )


def default_home() -> Path:
    """``~/.cache/hybrid-dit``, usable or not.

    Raises:
        RuntimeError: this user has no home.
    """
    return Path.home() / ".cache" / "hybrid-dit"


def new_private_folder() -> Path:
    """A folder that nobody else can enter (mode 0700), and that a socket named `SOCKET_NAME` can be in.

    Raises:
        ValueError: there is none, with the reason.
        OSError: no more sockets can be opened at all.
    """
    reasons = []
    for parent in [*_temporary_folders(), *_homes()]:
        try:
            folder = Path(tempfile.mkdtemp(prefix="hybrid-dit-", dir=parent))
        except OSError as error:
            reasons.append(f"{parent}: {_reason(error)}")
            continue
        try:
            folder.chmod(0o700)  # whatever the umask took away
            _try_socket(folder / SOCKET_NAME)
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            if error.errno in (errno.EMFILE, errno.ENFILE):  # not the folder's fault
                raise
            reasons.append(f"{parent}: {_reason(error)}")
        else:
            return folder
    raise ValueError(
        f"no folder can hold a socket ({'; '.join(dict.fromkeys(reasons))}); set TMPDIR to a folder on a local disk "
        "that you can write to, with a path of at most 70 bytes"
    )


def new_log_folder() -> Path:
    """A folder for the logs of a new group, in the place of the oldest one of our own that no group is using.

    Raises:
        ValueError: see `home`.
    """
    root = home() / "logs"
    for old in sorted(_earlier_logs(root))[: -KEPT_LOGS + 1]:
        if not _in_use(old):
            shutil.rmtree(old, ignore_errors=True)
    folder = tempfile.mkdtemp(dir=root, prefix=time.strftime("%Y%m%d-%H%M%S-"))
    with contextlib.suppress(OSError):  # a disk without modes
        os.chmod(folder, 0o700)
    return Path(folder)


def compiler_caches() -> dict[str, str]:
    """Variables that have Triton and torch.compile keep in `home` what they compile, where their own folders, below the
    user's home and named after the user, cannot be used."""
    found = {}
    if not (os.environ.get("TRITON_CACHE_DIR") or os.environ.get("TRITON_HOME")) and not _has_home():
        found["TRITON_CACHE_DIR"] = str(home() / "triton")
    if not os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
        try:
            getpass.getuser()
        except (KeyError, OSError, ImportError):  # no name, as in a container that runs as any number
            found["TORCHINDUCTOR_CACHE_DIR"] = str(home() / "torchinductor")
    return found


def _has_home() -> bool:
    try:
        folder = Path.home() / ".triton"
        while not folder.exists():
            folder = folder.parent
        return os.access(folder, os.W_OK | os.X_OK)
    except (OSError, RuntimeError):
        return False


def hold(log: int) -> None:
    """Keep a folder of logs from being removed, as long as any process has this descriptor of its `AGENT_LOG`."""
    import fcntl  # not on Windows, where the pack still loads

    with contextlib.suppress(OSError):  # see `UNLOCKED_SECONDS`
        fcntl.flock(log, fcntl.LOCK_SH | fcntl.LOCK_NB)


def _earlier_logs(root: Path) -> Iterator[Path]:
    """Folders of logs that this user's groups have made; never a link, nor what others keep beside them."""
    with contextlib.suppress(OSError):
        for folder in root.iterdir():
            with contextlib.suppress(OSError):
                here = folder.lstat()
                mine = stat.S_ISDIR(here.st_mode) and here.st_uid == os.geteuid()
                if mine and _OURS.fullmatch(folder.name) and (folder / AGENT_LOG).is_file():
                    yield folder


def _in_use(folder: Path) -> bool:
    """Whether a group, of any ComfyUI, writes its logs into a folder."""
    import fcntl

    with (folder / AGENT_LOG).open("r+b") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return time.time() - max(file.stat().st_mtime for file in folder.iterdir()) < UNLOCKED_SECONDS
    return False


def _usable(folder: Path) -> Path:
    """A folder with one for logs in it, that can be written to; what is missing is made for this user alone.

    Raises:
        OSError: it cannot be used.
    """
    logs = folder / "logs"
    for part in reversed([logs, *logs.parents]):
        if not part.exists():
            _make(part)
    if not os.access(logs, os.W_OK | os.X_OK):
        raise PermissionError(f"{logs} cannot be written to")
    return folder


def _make(folder: Path) -> None:
    try:
        folder.mkdir(0o700)
    except FileExistsError:  # another process was faster
        return
    with contextlib.suppress(OSError):
        folder.chmod(0o700)  # whatever the umask took away


def _own_temporary(parent: Path) -> Path:
    """The folder of this user among temporary ones, found again by the next group. Others may have made what has its
    name."""
    folder = parent / f"hybrid-dit-{os.geteuid()}"
    if not os.path.lexists(folder):
        _make(folder)
    here = folder.lstat()
    if not stat.S_ISDIR(here.st_mode) or here.st_uid != os.geteuid() or here.st_mode & 0o022:
        folder = Path(tempfile.mkdtemp(prefix="hybrid-dit-logs-", dir=parent))
    return _usable(folder)


def _temporary_folders() -> list[Path]:
    """Where temporary files may go, the user's choice first."""
    named = [os.environ.get("XDG_RUNTIME_DIR"), "/tmp", "/var/tmp", "/dev/shm"]
    with contextlib.suppress(FileNotFoundError):  # none can be written to
        named.insert(0, tempfile.gettempdir())
    return [Path(name) for name in dict.fromkeys(filter(None, named))]


def _homes() -> list[Path]:
    with contextlib.suppress(ValueError):
        return [home()]
    return []


def _try_socket(path: Path) -> None:
    """Make a socket and remove it.

    Raises:
        OSError: the path is too long for one, or the file system has none.
    """
    if len(os.fsencode(path)) > _SOCKET_BYTES:
        raise OSError(f"its path is too long for a socket, which can have {_SOCKET_BYTES} bytes")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        probe.bind(str(path))
        path.chmod(0o600)
    path.unlink()


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error)
