"""Ports: bounded numbers, one deadline for a proof, descriptors that run out, strangers in crowds."""

import asyncio
import contextlib
import os
import random
import resource
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator

import pytest

from excimer.base.address import Address
from excimer.service import accept
from excimer.service.accept import accept_connections, open_streams
from excimer.service.connections import (
    Admission,
    ConnectionGate,
    ConnectionLimits,
    TooManyConnectionsError,
)
from excimer.service.listen import bind_listen, bound_address
from excimer.service.tasks import TaskScope, running

PASSWORD = b"sesame\n"


class Echo:
    """A port: the password first, then every line comes back."""

    def __init__(self, limits: ConnectionLimits) -> None:
        self.gate = ConnectionGate("echo", limits)
        self.bound = bind_listen("127.0.0.1:0", "echo")
        self.address = bound_address(self.bound)
        self._scope = TaskScope()

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator["Echo"]:
        accepting = accept_connections(self.bound, self.gate, self._accepted)
        with self.bound:
            async with self._scope, running("accept", accepting):
                yield self

    def _accepted(self, admission: Admission) -> None:
        self._scope.contain("connection", self._serve(admission))

    async def _serve(self, admission: Admission) -> None:
        reader, writer = await open_streams(admission)
        try:
            if await reader.readline() != PASSWORD:
                return
            admission.authenticated()
            writer.write(b"welcome\n")
            while line := await reader.readline():
                writer.write(line)
        except TooManyConnectionsError as error:
            writer.write(f"{error}\n".encode())
        except ConnectionError:
            return
        finally:
            admission.release()
            writer.close()


async def say(address: Address, *lines: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection(*address)
    for line in lines:
        writer.write(line)
    return reader, writer


async def end_of(reader: asyncio.StreamReader) -> bytes:
    try:
        return await asyncio.wait_for(reader.read(), 30)
    except ConnectionError:
        return b""


def test_a_deadline_is_one_however_slowly_bytes_drip() -> None:
    async def main() -> None:
        async with Echo(ConnectionLimits(handshake_s=0.3)).serving() as echo:
            reader, writer = await say(echo.address)
            started = time.monotonic()
            with contextlib.suppress(ConnectionError):
                while not reader.at_eof() and time.monotonic() - started < 20:
                    writer.write(b"s")
                    await writer.drain()
                    await asyncio.sleep(0.05)
            assert 0.25 < time.monotonic() - started < 10
            assert echo.gate.waiting_count == 0
            writer.close()
            _, proven = await say(echo.address, PASSWORD)
            await asyncio.sleep(0.6)
            assert echo.gate.authenticated_count == 1
            proven.close()

    asyncio.run(main())


def test_strangers_crowd_out_strangers_only() -> None:
    async def main() -> None:
        async with Echo(ConnectionLimits(waiting_max=4)).serving() as echo:
            mine, my_writer = await say(echo.address, PASSWORD)
            assert await mine.readline() == b"welcome\n"
            crowd = [await say(echo.address) for _ in range(60)]
            for reader, _ in crowd[:-4]:
                assert await end_of(reader) == b""
            assert echo.gate.waiting_count == 4
            late, late_writer = await say(echo.address, PASSWORD)
            assert await late.readline() == b"welcome\n"
            my_writer.write(b"still here\n")
            assert await mine.readline() == b"still here\n"
            for _, writer in [*crowd, (late, late_writer), (mine, my_writer)]:
                writer.close()

    asyncio.run(main())


def test_authenticated_connections_are_bounded_and_told_so() -> None:
    async def main() -> None:
        async with Echo(ConnectionLimits(authenticated_max=2)).serving() as echo:
            opened = [await say(echo.address, PASSWORD) for _ in range(2)]
            assert [await reader.readline() for reader, _ in opened] == [b"welcome\n"] * 2
            third, writer = await say(echo.address, PASSWORD)
            assert b"echo has 2 connections" in await end_of(third)
            writer.close()
            opened[0][1].close()
            for _ in range(1000):
                if echo.gate.authenticated_count < 2:
                    break
                await asyncio.sleep(0.01)
            fourth, writer = await say(echo.address, PASSWORD)
            assert await fourth.readline() == b"welcome\n"
            writer.close()
            opened[1][1].close()

    asyncio.run(main())


def test_waiting_again_has_a_deadline_too() -> None:
    async def main() -> None:
        ours, theirs = socket.socketpair()
        gate = ConnectionGate("test", ConnectionLimits())
        admission = gate.admit(ours)
        admission.authenticated()
        admission.waits_again(0.05)
        assert (gate.waiting_count, gate.authenticated_count) == (1, 0)
        loop = asyncio.get_running_loop()
        theirs.setblocking(False)
        assert await asyncio.wait_for(loop.sock_recv(theirs, 1), 30) == b""
        admission.waits_again(1)  # gone already: it gets no new place
        assert (gate.waiting_count, gate.authenticated_count) == (0, 0)
        gate.close()
        ours.close()
        theirs.close()

    asyncio.run(main())


def test_limits_fit_what_a_process_may_open() -> None:
    assert ConnectionLimits().within_open_files(256) == ConnectionLimits(64, 16, 10.0)
    assert ConnectionLimits().within_open_files(1 << 20) == ConnectionLimits()
    assert ConnectionLimits().within_open_files(1) == ConnectionLimits(1, 1, 10.0)


EXHAUSTED = """
import asyncio, os, resource, socket, sys, time
from excimer.service.accept import accept_connections
from excimer.service.connections import ConnectionGate, ConnectionLimits
from excimer.service.listen import bind_listen, bound_address
from excimer.service.tasks import running

async def main():
    bound = bind_listen("127.0.0.1:0", "port")
    gate = ConnectionGate("port", ConnectionLimits(waiting_max=10_000, handshake_s=60))
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    admissions = []
    seen = {}

    def accepted(admission):
        admissions.append(admission)
        asyncio.get_running_loop().add_reader(admission.socket, gone, admission)

    def gone(admission):
        asyncio.get_running_loop().remove_reader(admission.socket)
        admission.release()
        admission.socket.close()

    async with running("accept", accept_connections(bound, gate, accepted)):
        print(bound_address(bound).port, flush=True)
        before = time.process_time()
        await asyncio.sleep(1.5)
        print(len(admissions), time.process_time() - before, flush=True)

asyncio.run(main())
"""


def test_descriptors_that_run_out_end_nothing_and_nothing_spins() -> None:
    """200 connections where 64 files may be open: the oldest go, the newest are accepted in their turn."""
    with subprocess.Popen(
        [sys.executable, "-c", EXHAUSTED],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        opened = [socket.create_connection(("127.0.0.1", port), timeout=30) for _ in range(100)]
        output, errors = process.communicate(timeout=60)
        for connection in opened:
            connection.close()
    assert process.returncode == 0, errors
    accepted, cpu_s = output.split()
    assert 50 <= int(accepted) <= 100, errors
    assert float(cpu_s) < 0.75, "the event loop spins"
    assert errors.count("connections cannot be accepted") <= 1.5 / accept.PAUSE_S + 2
    assert "Traceback" not in errors


@pytest.mark.parametrize("seed", range(5))
def test_random_bytes_end_only_their_own_connection(seed: int) -> None:
    chance = random.Random(seed)

    async def main() -> None:
        async with Echo(ConnectionLimits(handshake_s=5)).serving() as echo:
            for _ in range(20):
                reader, writer = await say(echo.address, chance.randbytes(chance.randrange(1, 200)))
                writer.write_eof()
                await end_of(reader)
                writer.close()
            reader, writer = await say(echo.address, PASSWORD)
            assert await reader.readline() == b"welcome\n"
            writer.close()

    asyncio.run(main())


def test_this_machine_has_files_for_these_tests() -> None:
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= 256
