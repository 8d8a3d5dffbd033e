"""A rank's log: what native code prints is in it, it stays within bounds, and only its user can read it."""

import stat
import subprocess
import sys

from parallel_backend.runtime.rank.rank_log import log_file, shorten

SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from parallel_backend.runtime.rank import rank_log
rank_log.CHECK_SECONDS, rank_log.MAX_BYTES = 0.05, 4000
rank_log.log_to(Path(sys.argv[1]))
print("from Python", flush=True)
os.write(2, b"from native code\\n")
os.kill(os.getpid(), signal.SIGUSR1)
if len(sys.argv) > 2:
    for number in range(2000):
        print(f"line {number}", flush=True)
    time.sleep(0.5)
    print("the last line", flush=True)
"""


def run(file, *arguments):
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(file), *arguments], capture_output=True, check=True)
    assert done.stdout + done.stderr == b""
    return file.read_text()


def test_everything_is_in_one_file(tmp_path):
    file = log_file(tmp_path, 3)
    text = run(file)
    assert file.name == "rank-3.log"
    assert "from Python\nfrom native code\n" in text
    assert "most recent call first" in text  # the stacks that SIGUSR1 asks for
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_it_stays_within_bounds_and_keeps_its_end(tmp_path):
    text = run(log_file(tmp_path, 0), "much")
    assert len(text) <= 4000
    assert text.startswith("(older lines were removed)\nline ")
    assert text.endswith("line 1999\nthe last line\n")


def test_a_short_log_is_left_alone(tmp_path):
    file = tmp_path / "log"
    file.write_text("one\ntwo\n")
    shorten(file, 8)
    assert file.read_text() == "one\ntwo\n"
