"""Which of this machine's addresses and interfaces lead to another host."""

from __future__ import annotations

import array
import contextlib
import ipaddress
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

from ..host_address import Hosts

IFNAME_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""What has gloo and NCCL use an interface."""
NO_NAME_SERVER = {"RES_OPTIONS": "attempts:0"}
"""What has the C library ask none. A store asks for the name of each address that it connects to, for a message that is
mostly not written; ``127.0.0.1`` is not found in /etc/hosts, since it is looked for as an IPv6 address."""
_SIOCGIFCONF = 0x8912
_IFREQ = 40
"""Bytes of the kernel's struct ifreq on 64-bit Linux: a name of 16, then a socket address."""


def loopback() -> str:
    """The address at which processes of this machine reach each other: IPv4's, or IPv6's where there is no other.

    Raises:
        ValueError: there is neither.
    """
    for number in ("127.0.0.1", "::1"):
        with contextlib.suppress(ValueError):
            return local_address(number)
    raise ValueError(
        "this machine has no loopback interface that is up, through which the ranks find each other; bring it up (ip "
        "link set lo up), or give the container or sandbox a network of its own"
    )


def resolve(address: str) -> str:
    """The number of an address, IPv4 where there is one.

    Raises:
        ValueError: it is not known.
    """
    try:
        found = {family: str(place[0]) for family, *_, place in socket.getaddrinfo(address, None)}
    except OSError as error:
        raise ValueError(f"the address {address!r} cannot be found ({error.strerror}); write it as a number") from None
    return found.get(socket.AF_INET) or found[socket.AF_INET6]


def own_address(hosts: Hosts) -> str:
    """The number of the endpoint's address, which is one of this machine, and free to listen on.

    Raises:
        ValueError: it is another machine's, the others cannot reach it, or the port is taken.
    """
    number = resolve(hosts.address)
    loopback = ipaddress.ip_address(number).is_loopback
    if loopback and hosts.address not in (number, "localhost"):
        raise ValueError(
            f"on this machine the name {hosts.address!r} means {number}, where other hosts cannot reach it; write the "
            "address that they know it by into the rdzv_endpoint"
        )
    with socket.socket(_family(number)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((number, hosts.port))
            probe.listen()
        except OSError as error:
            raise ValueError(
                f"this machine cannot listen at the rdzv_endpoint {hosts.endpoint} ({error.strerror}); it has to be an "
                "address of the host with ComfyUI, and a port that nobody uses"
            ) from None
    return number


def local_address(number: str) -> str:
    """The address of this machine that leads to another one; of an address of this machine, itself.

    Raises:
        ValueError: none does.
    """
    with socket.socket(_family(number), socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((number, 9))  # sends nothing
        except OSError as error:
            raise ValueError(f"{number} cannot be reached from this machine ({error.strerror})") from None
        return str(probe.getsockname()[0])


def interface_to(number: str) -> str:
    """The name of the interface that leads to an address; of an address of this machine, the one that has it.

    Raises:
        ValueError: none does, or its name cannot be told.
    """
    local = ipaddress.ip_address(local_address(number))
    for name, address in _interfaces(local.version):
        if address == local:
            return name
    raise ValueError(f"no interface has the address {local}; name one in {' and '.join(IFNAME_VARIABLES)}")


def interface_variables(number: str) -> dict[str, str]:
    """Environment that has gloo and NCCL use the interface that leads to an address, unless the user has set it.

    Raises:
        ValueError: see `interface_to`.
    """
    missing = [name for name in IFNAME_VARIABLES if not os.environ.get(name)]
    return dict.fromkeys(missing, interface_to(number)) if missing else {}


def _family(number: str) -> int:
    return socket.AF_INET if ipaddress.ip_address(number).version == 4 else socket.AF_INET6


def _interfaces(version: int) -> Iterator[tuple[str, ipaddress.IPv4Address | ipaddress.IPv6Address]]:
    """Names of interfaces and their addresses of an IP version."""
    if version == 6:
        with contextlib.suppress(OSError):
            for line in Path("/proc/net/if_inet6").read_text().splitlines():
                digits, *_, name = line.split()
                yield name, ipaddress.IPv6Address(bytes.fromhex(digits))
        return
    import fcntl  # not on Windows, where the pack still loads

    requests = array.array("B", bytes(_IFREQ * 512))
    pointer, _ = requests.buffer_info()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        answer = fcntl.ioctl(control, _SIOCGIFCONF, struct.pack("iP", len(requests), pointer))
    used, _ = struct.unpack("iP", answer)
    for offset in range(0, used, _IFREQ):
        entry = requests[offset : offset + _IFREQ].tobytes()
        # A label such as eth0:1 stands for a further address of eth0.
        name = entry[:16].rstrip(b"\0").decode().partition(":")[0]
        yield name, ipaddress.IPv4Address(entry[20:24])
