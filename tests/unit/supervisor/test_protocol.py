"""What the supervisor reads from its socket."""

import socket
import threading

import pytest

from excimer.supervisor.protocol import receive


def test_who_goes_on_for_ever_is_given_up() -> None:
    """Nobody else is served meanwhile, and no service that died comes back."""
    client, server = socket.socketpair()
    is_over = threading.Event()

    def drip() -> None:
        while not is_over.wait(0.01):
            client.sendall(b" ")

    thread = threading.Thread(target=drip)
    with client, server:
        thread.start()
        try:
            with pytest.raises(TimeoutError):
                receive(server, 0.2)
        finally:
            is_over.set()
            thread.join()
