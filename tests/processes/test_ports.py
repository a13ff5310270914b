"""A held port goes to whoever it is meant for and to nobody else."""

from __future__ import annotations

import gc
import socket
import struct
import subprocess
import sys
import time

import pytest

from atropos_exp.processes.ports import HeldPort

IP_LOCAL_PORT_RANGE = 51  # of Linux 6.3 and newer: which free ports the kernel may give a socket


def _socket_that_can_only_get(number: int) -> socket.socket:
    free = socket.socket()
    try:
        free.setsockopt(socket.IPPROTO_IP, IP_LOCAL_PORT_RANGE, struct.pack("I", number << 16 | number))
    except OSError:
        free.close()
        pytest.skip("this kernel cannot narrow the range of free ports")
    return free


@pytest.mark.parametrize("reuse", [0, 1])
def test_the_kernel_gives_it_to_no_server(reuse: int) -> None:
    held = HeldPort()
    with _socket_that_can_only_get(held.number) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
        with pytest.raises(OSError, match="in use"):
            server.bind(("127.0.0.1", 0))
    held.close()
    held.close()
    with _socket_that_can_only_get(held.number) as server:  # given back, and the range does what it says
        server.bind(("127.0.0.1", 0))


def test_the_kernel_gives_it_to_no_connection() -> None:
    held = HeldPort()
    with socket.create_server(("127.0.0.1", 0)) as elsewhere, _socket_that_can_only_get(held.number) as client:
        with pytest.raises(OSError, match="assign"):
            client.connect(elsewhere.getsockname())
        del held
        gc.collect()
        client.connect(elsewhere.getsockname())


@pytest.mark.parametrize("host", ["127.0.0.1", ""])
def test_servers_listen_on_it_one_after_the_other(host: str) -> None:
    held = HeldPort(host)
    for _ in range(2):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", held.number))
        with held.listen():
            socket.create_connection(("127.0.0.1", held.number)).close()
            with pytest.raises(OSError, match="in use"):
                held.listen()


@pytest.mark.parametrize("program", [
    "import uvicorn; uvicorn.run(lambda: None, factory=True, lifespan='off', port={port})",
    "import torch.distributed as d; s = d.TCPStore('127.0.0.1', {port}, is_master=True); s.get('never')",
])  # fmt: skip
def test_the_servers_that_need_it_can_listen(program: str) -> None:
    """The API of Atropos is served by uvicorn, and ranks meet at torch's store."""
    held = HeldPort()
    server = subprocess.Popen([sys.executable, "-c", program.format(port=held.number)], stderr=subprocess.PIPE)
    try:
        while server.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", held.number)).close()
                break
            except ConnectionRefusedError:
                time.sleep(0.05)
        assert server.poll() is None, server.stderr and server.stderr.read().decode()
    finally:
        server.kill()
        server.communicate()
