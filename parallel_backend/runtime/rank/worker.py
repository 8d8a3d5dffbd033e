"""One rank of a worker group: ``torchrun ... -m parallel_backend.runtime.rank.worker --socket PATH --device cpu|cuda``.

It connects to the client's socket, does what it is told one request after the other, and ends when the client is gone.
On another host than the client's, the socket is that of the process that looks after the ranks there (`host`).
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import select
import socket
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore

from ...config import ParallelismConfig, Speed
from ...families import VisionImage
from ...mesh import AnotherRankError
from ..errors import BatchTooLargeError, out_of_reach
from ..forking import end_with_parent, take_name
from ..patience import STEP_SECONDS, mesh_seconds, step_seconds
from ..wire.channel import Channel, ChannelClosedError
from ..wire.messages import (
    Adapt,
    DecodeLatent,
    Done,
    EncodeImage,
    EncodeText,
    EndRun,
    Failed,
    Hello,
    Keep,
    Lend,
    Load,
    Message,
    Notice,
    Offload,
    Predict,
    Progress,
    Stats,
    Unload,
)
from ..wire.shared_tensors import Buffer
from .device_failure import describe_device, device_failed
from .engine import Engine
from .mesh_check import MeshCheck, Unreached, UnreachedError
from .out_of_memory import out_of_memory
from .pulse import Pulse
from .rank_log import end_at_once, log_file, log_to
from .relay import Relay
from .vae_component import Piece

JOIN_SECONDS = 300.0
"""How long ranks may take to come up: some hosts import from a slow disk."""
JOIN_TIMES = 2
"""Meeting for the first time may take as many deadlines of an exchange: NCCL looks at the machine then."""
PULSE_SECONDS = 5.0


def main(forked: bool = False) -> None:
    """Entry point of a rank.

    Args:
        forked: whether libraries were imported in another environment than this one.
    """
    take_name()
    if not forked:
        end_with_parent()
    elif threads := os.environ["OMP_NUM_THREADS"].partition(",")[0].strip():
        with suppress(ValueError, RuntimeError):  # it is not a number of threads
            torch.set_num_threads(int(threads))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--socket", required=True, help="the client's AF_UNIX socket")
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--log-folder", type=Path, required=True, help="folder of the group's logs")
    arguments = parser.parse_args()

    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    log_to(log_file(arguments.log_folder, rank))
    sys.excepthook = end_at_once
    print(f"rank {rank} on {arguments.device}, process {os.getpid()}", flush=True)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(arguments.socket)
    channel = Channel(connection)
    threading.Thread(target=_end_with_client, args=(connection.fileno(),), daemon=True).start()
    channel.send(Hello(rank, os.getpid()))
    try:
        device = torch.device("cpu")
        if arguments.device == "cuda":
            device = torch.device("cuda", local_rank)
            torch.cuda.set_device(device)
        described = describe_device(device, local_rank)
        check = MeshCheck(device, mesh_seconds(), lambda _: None)
        _join(device, described)

        def notify(text: str) -> None:
            print(text, flush=True)
            if rank == 0:
                channel.send(Notice(text))

        def on_progress(done: int, total: int) -> None:
            channel.send(Progress(rank, done, total))

        over_hosts = int(os.environ["GROUP_WORLD_SIZE"]) > 1
        engine = Engine(device, notify, on_progress=on_progress, check=check)
        serve(Relay(channel) if over_hosts else channel, engine, described, channel)
    except ChannelClosedError:
        os._exit(0)


def _join(device: torch.device, described: str) -> None:
    """Make the default process group. Once all ranks are up it has a deadline, after which this one ends.

    Its keys in the store are the group's own: at the endpoint of several hosts there may have been another group.
    """
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = PrefixStore(
        os.environ["TORCHELASTIC_RUN_ID"], TCPStore(address, port, is_master=False, wait_for_workers=False)
    )
    backend, of_device = ("cpu:gloo,cuda:nccl", device) if device.type == "cuda" else ("gloo", None)
    store.set(f"up {rank}", "")
    store.wait([f"up {other}" for other in range(ranks)], timedelta(seconds=JOIN_SECONDS))

    def end(unreached: Unreached) -> None:
        faulthandler.dump_traceback(all_threads=True)
        print(
            f"rank {rank} ({described}) did not meet the other {ranks - 1} within {unreached.seconds:.0f} s\n"
            f"{out_of_reach([described], several_hosts=int(os.environ['GROUP_WORLD_SIZE']) > 1)}",
            flush=True,
        )
        os._exit(1)

    with MeshCheck(device, JOIN_TIMES * mesh_seconds(), end).within("all ranks", range(ranks)):
        dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, device_id=of_device)


def _end_with_client(descriptor: int) -> None:
    """End this process when the client is gone or has given this group up, even in the middle of a collective.

    Work in flight has no taker then. It leaves at once, without the goodbyes of the process group, which would wait for
    the other ranks.
    """
    poll = select.poll()
    poll.register(descriptor, select.POLLRDHUP)
    poll.poll()
    os._exit(0)


def serve(channel: Channel | Relay, engine: Engine, described: str = "", direct: Channel | None = None) -> None:
    """Carry out requests until the client is gone (ChannelClosedError).

    Args:
        channel: requests come from, and answers go to.
        engine: carries them out.
        described: this rank's device.
        direct: to who listens on this host, for what a thread has to say while this one is busy; by default none.
    """
    buffer = Buffer()
    request_id = -1
    beats = 0

    def beat() -> None:
        nonlocal beats
        beats += 1
        if direct is not None:
            direct.try_to_send(Progress(engine.rank, beats, 0))

    def stuck(unreached: Unreached) -> None:
        faulthandler.dump_traceback(all_threads=True)
        if direct is not None:
            direct.send(_unreached(request_id, engine.rank, described, unreached))

    engine.check.tell = stuck
    pulse = Pulse(min(PULSE_SECONDS, (step_seconds() or STEP_SECONDS) / 4), engine.device.type == "cpu", beat)
    while True:
        request, tensors = channel.receive()
        started = time.perf_counter()
        request_id = getattr(request, "id", -1)
        failed: Failed | None = None
        engine.alone = False
        try:
            # What other steps of its size took is known of a step, so that it needs no pulse.
            with pulse.watched(not isinstance(request, Predict) or request.first):
                data, answer = perform(engine, request, tensors)
        except ChannelClosedError:
            raise
        except UnreachedError as error:
            failed = _unreached(request_id, engine.rank, described, error.unreached)
        except Exception as error:
            failed = _failure(request_id, engine, error, described)
        if failed is not None:
            if failed.device_failed:  # nothing can be given back, and other ranks may wait for this one
                (direct or channel).send(failed)
                continue
            engine.recover(failed.alone)
            channel.send(failed)
            continue
        done = Done(request_id, engine.rank, time.perf_counter() - started, data)
        if engine.rank == 0 and answer:
            # The client has copied one prediction before it asks for the next.
            channel.send_tensors(done, answer, buffer if isinstance(request, Predict) else None)
        else:
            channel.send(done)


def perform(
    engine: Engine, request: Message, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, object], dict[str, Tensor]]:
    """Carry out one request; its data (each rank's) and its tensors (rank 0's, on any device)."""
    match request:
        case Load():
            engine.load(
                request.model,
                request.path,
                ParallelismConfig(request.ulysses, request.ring, request.tp),
                getattr(torch, request.dtype),
                engine.residents.on_progress,
                request.fp8,
                request.encoder_memory,
                request.orphans,
                request.content,
                Speed(request.compile, request.cuda_graphs, request.copy_engines),
                request.part,
            )
            return {"weight_formats": engine.models[request.model].formats()}, {}
        case Offload():
            return {"bytes": engine.offload(request.model, request.component)}, {}
        case Lend():
            freed, left, lent = engine.lend(request.size, request.ranks)
            return {"freed": freed, "left": left, "lent": lent}, {}
        case Unload():
            engine.unload(request.model)
            return {}, {}
        case EncodeText():
            images = [
                VisionImage(tensors[f"image{index}"], (grid[0], grid[1], grid[2]))
                for index, grid in enumerate(request.grids)
            ]
            return {}, {"context": engine.encode_text(request.model, tensors["ids"], tensors["mask"], images)}
        case Keep():
            engine.keep(request.model, tensors, request.forget)
            return {}, {}
        case Adapt():
            index, data = tensors["index"], tensors.get("data")
            engine.adapt(request.model, request.component, request.set, index, data, request.forget)
            return {}, {}
        case Predict():
            try:
                prediction, decision = engine.predict(
                    request.model,
                    tensors["x"],
                    tensors["timestep"],
                    request.context,
                    request.references,
                    {name: tensor for name, tensor in tensors.items() if name not in ("x", "timestep")},
                    request.options,
                    request.cache,
                    request.divisible,
                    request.kept,
                )
            except BatchTooLargeError as error:
                return {"too_large": str(error)}, {}
            return {} if decision is None else asdict(decision), {"prediction": prediction}
        case EndRun():
            engine.end_run(request.model, request.run)
            return {}, {}
        case DecodeLatent():
            piece = Piece(request.run, request.is_first, request.is_last)
            image = engine.decode(request.model, tensors["latent"], piece)
            return {}, {} if image is None else {"image": image}
        case EncodeImage():
            piece = Piece(request.run, request.is_first, request.is_last)
            latent = engine.encode(request.model, tensors["image"], piece)
            return {}, {} if latent is None else {"latent": latent}
        case Stats():
            return engine.stats(request.model), {}
    raise ValueError(f"a worker does not take a {type(request).__name__}")


def _failure(request_id: int, engine: Engine, error: Exception, device: str) -> Failed:
    text = traceback.format_exc()
    print(text, flush=True)
    # Of what another rank ran out of, that one says how much there was.
    memory = None if isinstance(error, AnotherRankError) else out_of_memory(error, engine.eviction.available)
    bad_input = isinstance(error, ValueError)
    described = str(error) if bad_input else f"{type(error).__name__}: {error}"
    if memory is None and device_failed(error):
        return Failed(request_id, engine.rank, described, False, text, device=device, device_failed=True)
    collectives = engine.meshes.collectives_begun()
    return Failed(
        request_id, engine.rank, described, bad_input, text, memory and list(memory), collectives, engine.alone, device
    )


def _unreached(request_id: int, rank: int, device: str, found: Unreached) -> Failed:
    text = f"ranks {list(found.ranks)} were not reached on the axis {found.axis}"
    return Failed(
        request_id, rank, text, False,
        device=device, axis=found.axis, unreached=list(found.ranks), seconds=found.seconds,
    )  # fmt: skip


if __name__ == "__main__":
    main()
