"""A real ComfyUI server under test: where it is, how to start and stop it, and how to run graphs on it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

LAUNCHER = Path(__file__).resolve().with_name("launch_server.py")
CHECKOUT = LAUNCHER.parents[2]
PACK_NAME = "hybrid-dit"

HOW_TO_GET = (
    "no ComfyUI found: set COMFYUI_PATH to a ComfyUI folder (the one with main.py), or make one with "
    "scripts/setup_comfyui.sh SOURCE ~/ComfyUI, where SOURCE is ComfyUI's git URL or a local clone of it"
)

STATE_EVENT = "hybrid_dit.state"
"""What nodes/states.py sends to all clients."""

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")

# Kinds of binary websocket frames (ComfyUI's protocol.py).
_PREVIEW_IMAGE = 1
_TEXT = 3
_PREVIEW_IMAGE_WITH_METADATA = 4


class ServerDied(RuntimeError):  # noqa: N818
    """The server process ended, or did not come up; the message ends with its log."""


class PromptRejected(RuntimeError):  # noqa: N818
    """The server refused a graph (HTTP 400). ``details`` is its answer, ``node_errors`` the part about nodes."""

    def __init__(self, details: dict[str, Any]) -> None:
        super().__init__(json.dumps(details, indent=1))
        self.details = details
        self.node_errors: dict[str, Any] = details.get("node_errors", {})


@dataclass
class RunResult:
    """What came of one graph.

    Args:
        outputs: node id -> the node's ui output, from the history.
        messages: all JSON events (``{"type": ..., "data": ...}``) while the graph ran, in order; none of other prompts.
        previews: encoded images (JPEG or PNG) of the binary preview frames.
        texts: ``(node id, text)`` of the progress texts that nodes sent, and of the pack's own states of workers.
        error: data of ``execution_error`` (``exception_message``, ``node_type``, ``traceback``...), or None.
        interrupted: the user's interrupt ended the run.
        seconds: from queueing to the last event.
    """

    prompt_id: str
    outputs: dict[str, Any] = field(default_factory=dict)
    messages: list[dict[str, Any]] = field(default_factory=list)
    previews: list[bytes] = field(default_factory=list)
    texts: list[tuple[str, str]] = field(default_factory=list)
    error: dict[str, Any] | None = None
    interrupted: bool = False
    seconds: float = 0.0

    def cached_nodes(self) -> set[str]:
        """Ids of the nodes that did not run because nothing had changed."""
        return {node for m in self.messages if m["type"] == "execution_cached" for node in m["data"].get("nodes", [])}

    def files(self, kind: str = "images") -> list[dict[str, str]]:
        """All files (``{"filename", "subfolder", "type"}``) that output nodes reported under ``kind``."""
        return [item for output in self.outputs.values() for item in output.get(kind, [])]


def find_comfyui() -> Path | None:
    """The ComfyUI folder to test with: ``$COMFYUI_PATH``, ``~/ComfyUI``, or the one this checkout is installed in."""
    candidates = [Path.home() / "ComfyUI"]
    candidates += [parent.parent for parent in Path(os.path.abspath(__file__)).parents if parent.name == "custom_nodes"]
    chosen = os.environ.get("COMFYUI_PATH")
    if chosen:
        # A wrong path must not be made up for silently by another ComfyUI.
        candidates = [Path(chosen).expanduser()]
    return next((path for path in candidates if (path / "main.py").is_file()), None)


def comfyui_python(path: Path) -> Path:
    """The Python that runs the ComfyUI in ``path``: that of its own venv, else this one."""
    for venv in ("venv", ".venv"):
        python = path / venv / "bin" / "python"
        if python.exists():
            return python
    return Path(sys.executable)


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class ComfyServer:
    """One ComfyUI server process with its own base folder; use it as a context manager or call start() and stop().

    Nothing is shared with the ComfyUI installation but its code: custom nodes, models, input, output, temp and user
    folders are new ones below ``base``. So a link to another checkout in ComfyUI/custom_nodes is never loaded.

    Args:
        comfyui: ComfyUI's folder; default find_comfyui().
        checkout: the pack under test, loaded as ``hybrid-dit``; None: ComfyUI without it.
        packs: further custom node packs (folders), loaded under their folder's name.
        diffusers_folder: a folder of pipeline folders, found by nodes under ``folder_paths``' key "diffusers".
        base: folder for everything the server reads and writes; default a temporary one that stop() removes.
        arguments: further arguments for main.py.
        environment: further environment variables.
    """

    def __init__(
        self,
        *,
        comfyui: Path | None = None,
        checkout: Path | None = CHECKOUT,
        packs: Sequence[Path] = (),
        diffusers_folder: Path | None = None,
        base: Path | None = None,
        arguments: Sequence[str] = ("--cpu",),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        found = comfyui or find_comfyui()
        if found is None:
            raise FileNotFoundError(HOW_TO_GET)
        self.comfyui = Path(found)
        self._owns_base = base is None
        self.base = Path(base) if base is not None else Path(tempfile.mkdtemp(prefix="comfy-test-"))
        self.port = free_port()
        self.log = self.base / "server.log"
        self.process: subprocess.Popen[bytes] | None = None
        self._arguments = list(arguments)
        self.environment = dict(environment or {})
        self._links = {Path(pack).name: Path(pack).resolve() for pack in packs}
        if checkout is not None:
            self._links[PACK_NAME] = Path(checkout).resolve()
        self._diffusers_folder = diffusers_folder

    # --- folders -----------------------------------------------------------------------------------------------------

    @property
    def models(self) -> Path:
        """The server's models folder (``loras``, ``diffusion_models``, ... below it are made on demand by callers)."""
        return self.base / "models"

    @property
    def input(self) -> Path:
        """The folder that LoadImage reads from."""
        return self.base / "input"

    @property
    def output(self) -> Path:
        """The folder that SaveImage writes to."""
        return self.base / "output"

    def _prepare_base(self) -> None:
        for name in ("models", "input", "output", "temp", "user", "custom_nodes"):
            (self.base / name).mkdir(parents=True, exist_ok=True)
        for name, target in self._links.items():
            link = self.base / "custom_nodes" / name
            if link.is_symlink():
                link.unlink()
            link.symlink_to(target, target_is_directory=True)

    def _command(self) -> list[str]:
        command = [str(comfyui_python(self.comfyui)), str(LAUNCHER), "--listen", "127.0.0.1", "--port", str(self.port)]
        command += ["--base-directory", str(self.base), "--database-url", "sqlite:///:memory:"]
        command += ["--disable-auto-launch", "--disable-api-nodes", "--preview-method", "auto"]
        # The user's own extra_model_paths.yaml may name a custom_nodes folder; its packs are not under test.
        command += ["--disable-all-custom-nodes"]
        if self._links:
            command += ["--whitelist-custom-nodes", *self._links]
        if self._diffusers_folder is not None:
            config = self.base / "model_paths.yaml"
            # JSON is YAML, and needs no YAML library to write.
            config.write_text(json.dumps({"under_test": {"diffusers": str(Path(self._diffusers_folder).resolve())}}))
            command += ["--extra-model-paths-config", str(config)]
        return command + self._arguments

    # --- process -----------------------------------------------------------------------------------------------------

    def __enter__(self) -> ComfyServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def launch(self) -> None:
        """Begin to start the server. Nothing where it was begun already."""
        if self.process is not None:
            return
        self._prepare_base()
        environment = {**os.environ, "HYBRID_DIT_LAUNCH_SCRATCH": str(self.base / "launch"), **self.environment}
        # pytest's own environment is not ComfyUI's.
        environment.pop("PYTHONHOME", None)
        environment.pop("VIRTUAL_ENV", None)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self._command(),
                cwd=self.comfyui,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def start(self, timeout: float = 120.0) -> ComfyServer:
        """Start the server and wait until it answers; raises ServerDied with the end of its log."""
        self.launch()
        assert self.process is not None
        deadline = time.monotonic() + timeout
        while True:
            if self.process.poll() is not None:
                raise self._failed(f"ComfyUI ended with code {self.process.returncode} while starting")
            with contextlib.suppress(OSError):
                self.get("/system_stats", timeout=5)
                return self
            if time.monotonic() > deadline:
                raise self._failed(f"ComfyUI did not answer within {timeout:.0f} s")
            time.sleep(0.2)

    def _failed(self, what: str) -> ServerDied:
        error = ServerDied(f"{what}\n{self.log_tail()}")
        self.stop()
        return error

    def stop(self) -> None:
        """End the server (SIGTERM, then SIGKILL for its process group) and remove ``base`` if it is ours."""
        self._end_process()
        if self._owns_base:
            shutil.rmtree(self.base, ignore_errors=True)

    def kill(self) -> None:
        """SIGKILL for the server process alone: what its children make of that is theirs to show."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        self.process = None

    def _end_process(self, grace: float = 10.0) -> None:
        process, self.process = self.process, None
        if process is None:
            return
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace)
        # Also when the server is gone: whoever it left behind in its group goes with it.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def log_text(self) -> str:
        """All that the server has written to stdout and stderr, without colours."""
        return _COLOURS.sub("", self.log.read_text(errors="replace")) if self.log.exists() else ""

    def log_tail(self, lines: int = 60) -> str:
        """The last lines of the log."""
        return "\n".join(self.log_text().splitlines()[-lines:])

    # --- HTTP --------------------------------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        """Where the server answers, without a slash at the end."""
        return f"http://127.0.0.1:{self.port}"

    def request(self, path: str, *, data: bytes | None = None, method: str | None = None, timeout: float = 30) -> bytes:
        """The body of the answer to a request; urllib.error.HTTPError for a status of 400 and above."""
        headers = {"Content-Type": "application/json"} if data is not None else {}
        request = urllib.request.Request(self.url + path, data=data, headers=headers, method=method)
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return answer.read()

    def get(self, path: str, timeout: float = 30) -> Any:
        """GET ``path``; the decoded JSON."""
        return json.loads(self.request(path, timeout=timeout))

    def post(self, path: str, body: Any = None, timeout: float = 30) -> Any:
        """POST JSON to ``path``; the decoded JSON of the answer, or None where it has no body."""
        answer = self.request(path, data=json.dumps(body if body is not None else {}).encode(), timeout=timeout)
        return json.loads(answer) if answer.strip() else None

    def object_info(self, node: str | None = None) -> dict[str, Any]:
        """All node definitions, or (in a dict of one) that of ``node``."""
        return self.get("/object_info" + (f"/{urllib.parse.quote(node)}" if node else ""))

    def queue(self, api_prompt: Mapping[str, Any], client_id: str) -> str:
        """Queue a graph in API form; its prompt id. Raises PromptRejected when the graph is not valid."""
        try:
            return self.post("/prompt", {"prompt": api_prompt, "client_id": client_id})["prompt_id"]
        except urllib.error.HTTPError as error:
            if error.code != 400:
                raise
            raise PromptRejected(json.loads(error.read())) from None

    def interrupt(self) -> None:
        """What the Cancel button does."""
        self.post("/interrupt")

    def image(self, filename: str, subfolder: str = "", type: str = "output") -> Image.Image:
        """An image that a node saved, as its ``images`` output names it: ``server.image(**result.files()[0])``."""
        query = urllib.parse.urlencode({"filename": filename, "subfolder": subfolder, "type": type})
        picture = Image.open(io.BytesIO(self.request(f"/view?{query}")))
        picture.load()
        return picture

    def add_input_image(self, name: str, picture: Image.Image) -> str:
        """Put ``picture`` where LoadImage finds it as ``name``."""
        picture.save(self.input / name)
        return name

    # --- graphs ------------------------------------------------------------------------------------------------------

    def run(
        self,
        api_prompt: Mapping[str, Any],
        timeout: float = 120.0,
        on_message: Callable[[dict[str, Any]], None] | None = None,
    ) -> RunResult:
        """Queue a graph and wait for its end, whatever that is.

        Args:
            api_prompt: the graph in API form.
            timeout: TimeoutError after so many seconds.
            on_message: called with each JSON event, while the graph runs.
        """
        import websocket

        client_id = uuid.uuid4().hex
        events = websocket.create_connection(
            f"ws://127.0.0.1:{self.port}/ws?clientId={client_id}", timeout=10, skip_utf8_validation=True
        )
        started = time.monotonic()
        try:
            result = RunResult(self.queue(api_prompt, client_id))
            self._listen(events, result, started + timeout, on_message)
        finally:
            events.close()
        result.seconds = time.monotonic() - started
        result.outputs = self.get(f"/history/{result.prompt_id}").get(result.prompt_id, {}).get("outputs", {})
        return result

    def _listen(
        self,
        events: Any,
        result: RunResult,
        deadline: float,
        on_message: Callable[[dict[str, Any]], None] | None,
    ) -> None:
        import websocket

        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"prompt {result.prompt_id} did not end in time\n{self.log_tail()}")
            events.settimeout(min(left, 5.0))
            try:
                frame = events.recv()
            except websocket.WebSocketTimeoutException:
                continue
            except (websocket.WebSocketException, OSError) as error:
                raise ServerDied(f"connection lost: {error}\n{self.log_tail()}") from error
            if isinstance(frame, bytes):
                preview = _preview_of(frame)
                if preview is not None:
                    result.previews.append(preview)
                text = _text_of(frame)
                if text is not None:
                    result.texts.append(text)
                continue
            if not frame:
                raise ServerDied(f"the server closed the connection\n{self.log_tail()}")
            message = json.loads(frame)
            data = message.get("data") or {}
            if data.get("prompt_id", result.prompt_id) != result.prompt_id:
                continue
            result.messages.append(message)
            if message["type"] == STATE_EVENT:
                result.texts.append((data["node"], data["text"]))
            if on_message is not None:
                on_message(message)
            if message["type"] == "execution_error":
                result.error = data
            elif message["type"] == "execution_interrupted":
                result.interrupted = True
            elif message["type"] == "executing" and data.get("node") is None and "prompt_id" in data:
                # Sent after the history has been written, on success and on failure.
                return


def _preview_of(frame: bytes) -> bytes | None:
    (kind,) = struct.unpack(">I", frame[:4])
    if kind == _PREVIEW_IMAGE:
        return frame[8:]
    if kind == _PREVIEW_IMAGE_WITH_METADATA:
        (length,) = struct.unpack(">I", frame[4:8])
        return frame[8 + length :]
    return None


def _text_of(frame: bytes) -> tuple[str, str] | None:
    (kind,) = struct.unpack(">I", frame[:4])
    if kind != _TEXT:
        return None
    (length,) = struct.unpack(">I", frame[4:8])
    return frame[8 : 8 + length].decode(), frame[8 + length :].decode()
