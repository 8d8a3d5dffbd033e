"""Where logs and sockets go on machines whose folders cannot be used, and what is left alone there."""

import errno
import fcntl
import getpass
import os
import re
import socket
import stat
import tempfile
from pathlib import Path

import pytest

from parallel_backend import paths
from parallel_backend.paths import AGENT_LOG, KEPT_LOGS, hold, home, new_log_folder, new_private_folder
from parallel_backend.runtime.hosts.torchrun import client_environment


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch) -> Path:
    """A folder for temporary files, and no home that is configured."""
    # Deep in pytest's own folder there is little room left for the path of a socket.
    folder = Path(tempfile.mkdtemp(prefix="paths-", dir="/tmp"))
    monkeypatch.delenv("HYBRID_DIT_HOME", raising=False)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    # What a test has made unreadable is not left behind.
    for entry in sorted(folder.rglob("*"), reverse=True):
        entry.unlink() if entry.is_symlink() or not entry.is_dir() else entry.rmdir()
    folder.rmdir()


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("what", ["/proc", "a file", "nobody's"])
def test_a_home_that_cannot_be_used(what, temporary, tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("HOME", str(file) if what == "a file" else what)
    if what == "nobody's":  # a user without an entry among the users, as in containers

        def no_home() -> Path:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(Path, "home", no_home)
    logs = new_log_folder()
    assert logs.parent == temporary / f"hybrid-dit-{os.geteuid()}" / "logs"
    assert {mode(folder) for folder in (logs, logs.parent, logs.parent.parent)} == {0o700}
    assert new_log_folder().parent == logs.parent  # found again
    assert new_private_folder().parent == temporary


@pytest.mark.parametrize("kind", ["link", "open to all", "file"])
def test_what_another_user_has_put_among_the_temporary_files_is_not_used(kind, temporary, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/proc")
    taken, elsewhere = temporary / f"hybrid-dit-{os.geteuid()}", tmp_path / "elsewhere"
    elsewhere.mkdir()
    if kind == "link":
        taken.symlink_to(elsewhere)
    elif kind == "file":
        taken.touch()
    else:
        taken.mkdir()
        taken.chmod(0o777)
    logs = new_log_folder()
    assert logs.parent.parent.name.startswith("hybrid-dit-logs-")
    assert not list(elsewhere.iterdir())
    assert kind != "open to all" or (mode(taken) == 0o777 and not list(taken.iterdir()))


@pytest.mark.parametrize("configured", ["/proc/none", "~nobody-of-that-name/x", "{tmp}/file/x"])
def test_a_configured_home_that_cannot_be_used_is_named(configured, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    configured = configured.format(tmp=tmp_path)
    monkeypatch.setenv("HYBRID_DIT_HOME", configured)
    with pytest.raises(ValueError, match=rf"{re.escape(configured)}.* of HYBRID_DIT_HOME cannot be used .*unset it"):
        new_log_folder()


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("housed", [True, False])
def test_what_compilers_keep(named, housed, temporary, tmp_path, monkeypatch):
    """Triton's folder is below the home, and torch's is named after the user; some users have neither."""
    for name in ("TRITON_CACHE_DIR", "TRITON_HOME", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)

    def getuser() -> str:
        if not named:
            raise KeyError("getpwuid(): uid not found: 54321")
        return "me"

    monkeypatch.setattr(getpass, "getuser", getuser)
    if not housed:
        (tmp_path / "file").touch()
        monkeypatch.setenv("HOME", str(tmp_path / "file"))
    environment = client_environment()
    assert environment.get("TRITON_CACHE_DIR") == (None if housed else str(home() / "triton"))
    assert environment.get("TORCHINDUCTOR_CACHE_DIR") == (None if named else str(home() / "torchinductor"))
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):  # the user's own choice
        monkeypatch.setenv(name, "/chosen")
    environment = client_environment()
    assert environment["TRITON_CACHE_DIR"] == environment["TORCHINDUCTOR_CACHE_DIR"] == "/chosen"


def test_no_folder_at_all(monkeypatch):
    monkeypatch.setenv("HOME", "/proc")
    monkeypatch.setattr(paths, "_temporary_folders", lambda: [Path("/proc")])
    with pytest.raises(ValueError, match=r"no place for logs: .*/proc.*; set HYBRID_DIT_HOME"):
        home()
    with pytest.raises(ValueError, match=r"no folder can hold a socket \(/proc: .*set TMPDIR to a folder on a local"):
        new_private_folder()


@pytest.mark.parametrize("umask", [0, 0o002, 0o077, 0o777], ids=oct)
def test_folders_are_ours_alone_whatever_the_umask(umask, tmp_path):
    before = os.umask(umask)
    try:
        logs, private = new_log_folder(), new_private_folder()
    finally:
        os.umask(before)
    made = [tmp_path / "home", *(tmp_path / "home" / part for part in (".cache", ".cache/hybrid-dit")), logs.parent]
    assert {mode(folder) for folder in [*made, logs, private]} == {0o700}


def make_logs(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / AGENT_LOG).touch()
    return folder


def test_a_home_that_other_programs_use(tmp_path, monkeypatch):
    """Only log folders of our own that no group writes to are removed, and no mode is changed."""
    shared = tmp_path / "shared"
    (shared / "logs").mkdir(parents=True)
    (shared / "logs").chmod(0o755)
    monkeypatch.setenv("HYBRID_DIT_HOME", str(shared))
    theirs = [shared / "logs" / name for name in ("0-archive", "20200101-000000-experim1", "a.log", "20200101")]
    for folder in theirs:
        folder.mkdir()
        (folder / "results").touch()
    linked = make_logs(tmp_path / "linked")
    (shared / "logs" / "20200101-000000-link1234").symlink_to(linked)
    ours = [make_logs(shared / "logs" / f"2020010{day}-000000-abcdefgh") for day in range(1, 9)]
    running = ours[0]
    with (running / AGENT_LOG).open("wb") as log:
        hold(log.fileno())
        for _ in range(KEPT_LOGS + 2):
            (new_log_folder() / AGENT_LOG).touch()
        assert all((folder / "results").exists() for folder in theirs)
        assert (linked / AGENT_LOG).exists()
        assert (running / AGENT_LOG).exists()
        assert not any(folder.exists() for folder in ours[1:])
        assert mode(shared / "logs") == 0o755
    new_log_folder()
    assert not running.exists()  # nobody has it open any more


def test_logs_where_files_cannot_be_locked(tmp_path, monkeypatch):
    monkeypatch.setenv("HYBRID_DIT_HOME", str(tmp_path))

    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    old, new = (make_logs(tmp_path / "logs" / f"2020010{day}-000000-abcdefgh") for day in (1, 2))
    os.utime(old / AGENT_LOG, (0, 0))
    for _ in range(KEPT_LOGS):
        (new_log_folder() / AGENT_LOG).touch()
    assert (old.exists(), new.exists()) == (False, True)


def test_logs_on_a_disk_without_modes(monkeypatch):
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "chmod", refused)
    assert new_log_folder().is_dir()


@pytest.mark.parametrize("name", ["画" * 40, "d" * 100], ids=["bytes", "letters"])
def test_a_temporary_folder_with_a_long_path(name, temporary, monkeypatch):
    deep = temporary / name
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    folder = new_private_folder()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / paths.SOCKET_NAME))
    assert not list(deep.iterdir())
    (folder / paths.SOCKET_NAME).unlink()
    folder.rmdir()


def test_a_temporary_folder_without_sockets(temporary, monkeypatch):
    """As on some shared and encrypted disks."""

    class Socket(socket.socket):
        def bind(self, address) -> None:
            if str(address).startswith(str(temporary)):
                raise OSError(errno.EOPNOTSUPP, "Operation not supported")
            super().bind(address)

    monkeypatch.setattr(socket, "socket", Socket)
    folder = new_private_folder()
    assert temporary not in folder.parents
    assert not list(folder.iterdir())
    assert not list(temporary.iterdir())
    folder.rmdir()


def test_no_folder_for_temporary_files(temporary, monkeypatch):
    """A container whose disk is read-only has none: the home is left."""
    monkeypatch.setenv("HYBRID_DIT_HOME", str(temporary / "home"))
    monkeypatch.setattr(paths, "_temporary_folders", list)
    assert new_private_folder().parent == home() == temporary / "home"
