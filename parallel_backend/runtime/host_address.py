"""Over how many hosts a group runs, and where they meet: what the user wrote, checked. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import is_int

EXAMPLE = "192.168.0.1:29500"


@dataclass(frozen=True)
class Hosts:
    """The hosts of a group. The first one (host 0) has the client; each has as many ranks as the others.

    Args:
        count: number of hosts.
        endpoint: ``ADDRESS:PORT`` of the first one, where the others find it; empty where there are no others.

    Raises:
        ValueError: a count that is no whole number of at least 1, or an endpoint that is missing, cannot be read or is
            of no use.
    """

    count: int = 1
    endpoint: str = ""

    def __post_init__(self) -> None:
        if not is_int(self.count) or self.count < 1:
            raise ValueError(f"the number of hosts (nnodes) must be a whole number of at least 1; got {self.count!r}")
        object.__setattr__(self, "endpoint", self.endpoint.strip())
        if self.several:
            if not self.endpoint:
                raise ValueError(
                    f"{self.count} hosts need an rdzv_endpoint: address and port of this host, such as {EXAMPLE}, as "
                    "the other hosts reach it"
                )
            self._split()
        elif self.endpoint:
            raise ValueError(
                f"the rdzv_endpoint {self.endpoint!r} is of no use to 1 host; set nnodes to the number of hosts, or "
                "leave the endpoint empty"
            )

    @property
    def several(self) -> bool:
        """Whether there are others than the first one."""
        return self.count > 1

    @property
    def address(self) -> str:
        """Of the endpoint: a name or a number."""
        return self._split()[0]

    @property
    def port(self) -> int:
        """Of the endpoint."""
        return self._split()[1]

    def _split(self) -> tuple[str, int]:
        address, _, port = self.endpoint.rpartition(":")
        bracketed = address.startswith("[") and address.endswith("]")
        address = address[1:-1] if bracketed else address
        # int() takes more than these digits.
        digits = port.isascii() and port.isdigit()
        if not address or (":" in address and not bracketed) or not digits or not 0 < int(port) < 2**16:
            raise ValueError(f"cannot read the rdzv_endpoint {self.endpoint!r}; write ADDRESS:PORT, such as {EXAMPLE}")
        return address, int(port)

    def ranks_each(self, ranks: int) -> int:
        """Ranks on each host.

        Raises:
            ValueError: the ranks cannot be shared out evenly.
        """
        if ranks % self.count:
            raise ValueError(
                f"{ranks} rank(s) cannot be shared out evenly among {self.count} hosts; choose degrees whose product "
                f"is a multiple of {self.count}"
            )
        return ranks // self.count

    def ranks_of(self, host: int, ranks: int) -> range:
        """The ranks on one of the hosts."""
        each = self.ranks_each(ranks)
        return range(host * each, (host + 1) * each)

    def command(self, host: int) -> str:
        """What is to be run on one of the others."""
        command = f"python -m parallel_backend worker --nnodes {self.count} --rdzv-endpoint {self.endpoint}"
        return command if self.count == 2 else f"{command} --node-rank {host}"


ALONE = Hosts()
"""One host."""
