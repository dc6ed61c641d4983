"""A proposer's connection to a timeline without its port: bytes over a real socket, moved as the port does.

`Driver` speaks to `SafekeeperTimeline.handle` alone; here appends go through `serve` as far as it takes them.
"""

import socket
import threading

from excimer._native.channel import Channel
from excimer.base.ids import NodeId
from excimer.safekeeper.timeline import SafekeeperTimeline
from excimer.wire.safekeeping import (
    NO_PROPOSER,
    AcceptorGreeting,
    AcceptorMessage,
    AcceptorMessageParser,
    ProposerGreeting,
    ProposerMessage,
    ProposerMessageParser,
    StandbysNeed,
    Term,
    TokenRenewal,
    encode_acceptor_message,
    encode_proposer_message,
)
from tests.kit.acceptor_driver import CONNECTION, IDENTITY, START, Driver

GREETING = encode_proposer_message(ProposerGreeting(identity=IDENTITY, proposer_id=NO_PROPOSER, token=""))
ANSWER_TO_GREETING = encode_acceptor_message(
    AcceptorGreeting(
        node_id=NodeId(1),
        identity=IDENTITY,
        term=Term(1),
        timeline_start_lsn=START,
        flush_lsn=START,
        commit_lsn=START,
    )
)
"""Parsers take nothing else before these."""


class StreamDriver(Driver):
    """Each `say` is one burst of bytes, which `serve` gets in pieces of at most `buffer_size_bytes`."""

    buffer_size_bytes = 1 << 18

    def __init__(self, timeline: SafekeeperTimeline, number: int = 1) -> None:
        super().__init__(timeline, number)
        self.connection = CONNECTION
        self.handled: list[ProposerMessage] = []
        """What `serve` left to `handle`, of all that was said."""

    def say(self, *messages: ProposerMessage) -> list[AcceptorMessage]:
        """The answers, in order. Raises what `serve` and `handle` raise."""
        return self.send(b"".join(encode_proposer_message(message) for message in messages))

    def send(self, data: bytes) -> list[AcceptorMessage]:
        answers = bytearray()
        ours, theirs = socket.socketpair()
        with ours, theirs:
            feeding = threading.Thread(target=_feed, args=(theirs, data))
            reading = threading.Thread(target=_collect, args=(theirs, answers))
            feeding.start()
            reading.start()
            try:
                self._receive(ours)
            finally:
                ours.shutdown(socket.SHUT_RDWR)
                feeding.join()
                reading.join()
        parser = AcceptorMessageParser()
        parser.feed(ANSWER_TO_GREETING)
        return [each for each in parser.feed(bytes(answers)) if not isinstance(each, StandbysNeed)]

    def _receive(self, ours: socket.socket) -> None:
        parser = ProposerMessageParser()
        parser.feed(GREETING)
        buffer = bytearray(self.buffer_size_bytes)
        channel = Channel(ours.fileno())
        while True:
            if parser.rest_size_bytes > len(buffer) // 2:
                size = channel.receive_into(buffer)
            else:
                rest = parser.take_rest()
                buffer[: len(rest)] = rest
                size = self.timeline.serve(self.connection, channel, buffer, len(rest))
            if size == 0:
                return
            frames = parser.feed(memoryview(buffer)[:size])
            messages = [frame for frame in frames if not isinstance(frame, TokenRenewal)]
            self.handled += messages
            if messages:
                for _, answer in self.timeline.handle(self.connection, messages):
                    channel.send_all(encode_acceptor_message(answer))


def _feed(theirs: socket.socket, data: bytes) -> None:
    try:
        theirs.sendall(data)
        theirs.shutdown(socket.SHUT_WR)
    except OSError:
        pass  # the other end has failed, which the test sees there


def _collect(theirs: socket.socket, answers: bytearray) -> None:
    while part := theirs.recv(1 << 16):
        answers += part
