"""Cores, memory and open files that a container, a job or a shell leaves a process: of made-up and of real ones."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from parallel_backend import limits
from parallel_backend.limits import Memory, memory, threads_of_a_rank

MIB = 2**20
ROOT = Path(__file__).parents[2]
MACHINE = {"proc/meminfo": f"MemTotal: {64 * 1024} kB\nMemFree: 1 kB\nMemAvailable: {48 * 1024} kB\n"}
V2 = {
    "proc/self/cgroup": "0::/user.slice/comfy.service\n",
    "proc/self/mountinfo": "31 23 0:28 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n",
}
V1 = {
    "proc/self/cgroup": "4:memory:/docker/abc/inner\n3:cpu,cpuacct:/docker/abc\n1:name=systemd:/\n0::/\n",
    "proc/self/mountinfo": (
        "30 23 0:27 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
        "35 31 0:32 /docker/abc /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
        r"36 31 0:33 /docker/abc /sys/fs/c\040pu rw master:3 - cgroup cgroup rw,cpu,cpuacct" + "\n"
    ),
}


def made_up(root: Path, *parts: Mapping[str, object]) -> Path:
    """A root folder with these files."""
    for name, content in {name: content for part in parts for name, content in part.items()}.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(str(content))
    return root


def test_a_machine_without_limits(tmp_path):
    assert memory(made_up(tmp_path / "none", MACHINE)) == Memory(64 * MIB, 48 * MIB)
    unlimited = {"sys/fs/cgroup/user.slice/memory.max": "max\n", "sys/fs/cgroup/user.slice/memory.current": 5}
    assert memory(made_up(tmp_path / "v2", MACHINE, V2, unlimited)) == Memory(64 * MIB, 48 * MIB)
    # What version 1 has for no limit.
    unlimited = {"sys/fs/cgroup/memory/memory.limit_in_bytes": 9223372036854771712}
    unlimited |= {"sys/fs/cgroup/memory/memory.usage_in_bytes": 5 * MIB}
    assert memory(made_up(tmp_path / "v1", MACHINE, V1, unlimited)) == Memory(64 * MIB, 48 * MIB)


@pytest.mark.parametrize("where", ["user.slice/comfy.service", "user.slice"])
@pytest.mark.parametrize("name", ["memory.max", "memory.high"])
def test_the_smallest_limit_of_all_ancestors(tmp_path, where, name):
    group = f"sys/fs/cgroup/{where}"
    files = {f"{group}/{name}": 32 * MIB, f"{group}/memory.current": 30 * MIB}
    # Files that were read stay in memory until it is wanted.
    files |= {f"{group}/memory.stat": f"anon {9 * MIB}\ninactive_file {2 * MIB}\nactive_file {MIB}\nslab 7\n"}
    other = {"user.slice", "user.slice/comfy.service"} - {where}
    files |= {f"sys/fs/cgroup/{each}/memory.max": 40 * MIB for each in other}
    files |= {f"sys/fs/cgroup/{each}/memory.current": 10 * MIB for each in other}
    root = made_up(tmp_path, MACHINE, V2, files)
    assert memory(root) == Memory(32 * MIB, 5 * MIB, str(root / group / name))


def test_a_container_of_version_1(tmp_path):
    """What is mounted shows the container's own group at its top, by another path than the process has."""
    top, inner = "sys/fs/cgroup/memory", "sys/fs/cgroup/memory/inner"
    files = {f"{inner}/memory.limit_in_bytes": 50 * MIB, f"{inner}/memory.usage_in_bytes": MIB}
    files |= {f"{top}/memory.limit_in_bytes": 20 * MIB, f"{top}/memory.usage_in_bytes": 18 * MIB}
    files |= {f"{top}/memory.stat": f"inactive_file 0\ntotal_inactive_file {MIB}\ntotal_active_file {MIB}\n"}
    root = made_up(tmp_path, MACHINE, V1, files)
    assert memory(root) == Memory(20 * MIB, 4 * MIB, str(root / top / "memory.limit_in_bytes"))


def test_a_namespace_that_hides_the_path(tmp_path):
    hidden = {"proc/self/cgroup": "0::/../../other\n", "sys/fs/cgroup/memory.max": 16 * MIB}
    hidden |= {"sys/fs/cgroup/memory.current": 20 * MIB}  # as while it makes room
    root = made_up(tmp_path, MACHINE, V2, hidden)
    assert (memory(root).total, memory(root).available) == (16 * MIB, 0)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (V2 | {"sys/fs/cgroup/user.slice/cpu.max": "250000 100000\n"}, [2.5]),
        (V2 | {"sys/fs/cgroup/user.slice/comfy.service/cpu.max": "max 100000\n"}, []),
        (V2 | {"sys/fs/cgroup/user.slice/comfy.service/cpu.max": "5000 100000\n"}, [1.0]),
        (V1 | {"sys/fs/c pu/cpu.cfs_quota_us": "300000\n", "sys/fs/c pu/cpu.cfs_period_us": "100000\n"}, [3.0]),
        (V1 | {"sys/fs/c pu/cpu.cfs_quota_us": "-1\n", "sys/fs/c pu/cpu.cfs_period_us": "100000\n"}, []),
        ({}, []),
    ],
    ids=["v2", "v2 without", "v2 less than one", "v1", "v1 without", "none"],
)
def test_quotas_of_cores(tmp_path, files, expected):
    assert list(limits._quotas(made_up(tmp_path, MACHINE, files))) == expected


@pytest.fixture
def pretend(monkeypatch):
    """Pretend that there are 8 cores, that so many are in the affinity, quotas, and variables of Slurm."""

    def pretend(affinity: int = 8, quotas: tuple[float, ...] = (), **slurm: str) -> None:
        monkeypatch.setattr(os, "cpu_count", lambda: 8)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(affinity)))
        monkeypatch.setattr(limits, "_quotas", lambda root: iter(quotas))
        for name in ("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in slurm.items():
            monkeypatch.setenv(name, value)

    return pretend


def test_cores_are_the_fewest_of_all_limits(pretend):
    pretend()
    assert (limits.cores(), threads_of_a_rank(2), threads_of_a_rank(16)) == (8, 4, 1)
    pretend(6, (7.0, 4.9))
    assert (limits.cores(), threads_of_a_rank(2)) == (4, 2)
    pretend(6, SLURM_CPUS_PER_TASK="3", SLURM_CPUS_ON_NODE="8")
    assert limits.cores() == 3
    pretend(6, SLURM_CPUS_ON_NODE="2")
    assert limits.cores() == 2
    pretend(6, SLURM_CPUS_ON_NODE="2(x3)")
    assert limits.cores() == 6


def test_affinity_of_a_real_process():
    code = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\n"
    code += "from parallel_backend.limits import cores; from parallel_backend.machine import collect\n"
    code += "from parallel_backend.planning.devices import Devices\n"
    code += "from parallel_backend.runtime.hosts.torchrun import inherited_environment as environment\n"
    code += "print(cores(), collect().cores, environment(1, Devices('cpu'))['OMP_NUM_THREADS'])"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == ["1", "1", "1"], done.stderr


def test_open_files_are_as_many_as_allowed():
    code = "import resource; from parallel_backend.limits import raise_open_files\n"
    code += "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 777)); raise_open_files()\n"
    code += "print(*resource.getrlimit(resource.RLIMIT_NOFILE))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == ["777", "777"], done.stderr


@contextlib.contextmanager
def real_group(controller: str, files: Mapping[str, int]) -> Iterator[Path]:
    """A control group of this machine with limits, below this process's own."""
    groups = [group for version, group in limits._groups(controller, Path("/")) if version == 1]
    if not groups:
        pytest.skip(f"no control groups of version 1 for {controller} here")
    # Quotas are looked for in a group below the top one, which has none.
    outer = groups[-1] / f"hybrid-dit-test-{os.getpid()}"
    try:
        outer.mkdir()
    except OSError as error:
        pytest.skip(f"control groups cannot be made here: {error}")
    inner = outer / "inner"
    try:
        inner.mkdir()
        for name, value in files.items():
            (outer / name).write_text(str(value))
        yield inner
    finally:
        inner.rmdir()
        outer.rmdir()


def within(group: Path, code: str) -> list[str]:
    """What Python prints in a process of a control group."""
    command = ["sh", "-c", 'echo $$ > "$1/cgroup.procs" && shift && exec "$@"', "sh", group, sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_memory_of_a_real_group():
    with real_group("memory", {"memory.limit_in_bytes": 700 * MIB}) as group:
        code = "from parallel_backend.limits import memory; found = memory(); print(found.total, found.available)"
        total, available = map(int, within(group, code))
        assert total == 700 * MIB
        assert 300 * MIB < available < 700 * MIB
        # A rank's share, by which it decides whether weights can move there.
        code = "from parallel_backend.runtime.rank.eviction import host_bytes; print(host_bytes())"
        assert 0 < int(within(group, code)[0]) < 700 * MIB


def test_cores_of_a_real_group():
    with real_group("cpu", {"cpu.cfs_period_us": 100000, "cpu.cfs_quota_us": 100000}) as group:
        assert within(group, "from parallel_backend.limits import cores; print(cores())") == ["1"]
