"""Names, ports and interfaces that the ranks meet over."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator

from pipeline.doctor.finding import FAILED, OK, WARNING, Finding

DEFAULT_PORT = 29500  # of DeepSpeed's and torch's launchers
PREFIXES = ("NCCL_", "GLOO_", "TORCH_NCCL_", "UCX_", "FI_")


def hostname() -> Iterator[Finding]:
    """Whether this machine's own name leads to an address: gloo listens there."""
    name = socket.gethostname()
    try:
        addresses = sorted({str(each[4][0]) for each in socket.getaddrinfo(name, None)})
    except socket.gaierror as error:
        found = f"{name} has no address: {error.strerror}"
        yield Finding("host name", WARNING, found, "add it to /etc/hosts, or export GLOO_SOCKET_IFNAME")
        return
    yield Finding("host name", OK, f"{name} is {', '.join(addresses)}")


def port() -> Iterator[Finding]:
    """Whether the port of the ranks' meeting is free."""
    given = os.environ.get("MASTER_PORT", "")
    number = int(given or DEFAULT_PORT)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", number))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            remedy = "deepspeed --master_port N, or export MASTER_PORT=N"
            yield Finding("port", FAILED if given else WARNING, f"{number} is taken by another program", remedy)
            return
    yield Finding("port", OK, f"{number} is free")


def interfaces() -> Iterator[Finding]:
    """The interfaces that NCCL and gloo are told to use, and every other setting of theirs."""
    there = [name for _, name in socket.if_nameindex()]
    settings = {name: value for name, value in sorted(os.environ.items()) if name.startswith(PREFIXES)}
    local = {name: value for name, value in settings.items() if name.endswith("_SOCKET_IFNAME")}
    same = {name: value for name, value in settings.items() if name not in local}  # names differ from node to node
    for variable, value in local.items():
        if unknown := [each for each in value.lstrip("=").split(",") if not _matches(variable, value, each, there)]:
            found = f"{variable}={value}, and {', '.join(unknown)} is not among {', '.join(there)}"
            yield Finding("interfaces", FAILED, found, f"export {variable} with a name that `ip link` shows", same)
            return
    shown = ", ".join(f"{name}={value}" for name, value in settings.items())
    yield Finding("interfaces", OK, f"{', '.join(there)}{'; ' + shown if shown else ''}", same=same)


def _matches(variable: str, value: str, name: str, there: list[str]) -> bool:
    """NCCL takes the start of a name, the whole one behind `=`, and all others behind `^`; gloo takes whole names."""
    if variable.startswith("GLOO") or value.startswith("="):
        return name in there
    return value.startswith("^") or any(each.startswith(name) for each in there)


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
