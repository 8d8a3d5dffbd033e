"""A rank ends by itself when its client does: nobody else has to be there to end it."""

import os
import socket

from parallel_backend.runtime.rank.worker import _end_with_client

WENT_ON = 7


def test_a_rank_ends_with_its_connection_and_not_before():
    client, rank = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if not (pid := os.fork()):
        client.close()
        _end_with_client(rank.fileno())
        os._exit(WENT_ON)
    rank.close()
    client.send(b"a request")
    assert os.waitpid(pid, os.WNOHANG) == (0, 0)
    client.close()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
