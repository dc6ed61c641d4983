"""The control file: what was written comes back; anything else is damage, named."""

from pathlib import Path

import pytest

from excimer.base.ids import NodeId
from excimer.base.lsn import Lsn
from excimer.consensus.acceptor import AcceptorState
from excimer.consensus.term_history import TermHistory
from excimer.safekeeper.control_file import (
    CONTROL_FILE_NAME,
    ControlFileDamagedError,
    ControlRecord,
    encode_control_record,
    read_control_file,
    write_control_file,
)
from excimer.safekeeper.disk import Disk
from excimer.wire.safekeeping import ProposerId, Term, TermStart
from tests.kit.acceptor_driver import IDENTITY, START

STATE = AcceptorState(
    promised_term=Term(9),
    voted_for=ProposerId(b"p" * 16),
    history=TermHistory((TermStart(Term(0), START), TermStart(Term(7), Lsn(START + 800)))),
    commit_lsn=Lsn(START + 400),
    horizon_lsn=START,
)
RECORD = ControlRecord.of(NodeId(3), IDENTITY, START, STATE)


def test_what_was_written_comes_back(tmp_path: Path) -> None:
    write_control_file(tmp_path, RECORD, Disk())
    found = read_control_file(tmp_path)
    assert (found.state, found.identity, found.node_id) == (STATE, IDENTITY, 3)
    assert [path.name for path in tmp_path.iterdir()] == [CONTROL_FILE_NAME]


def test_every_flipped_bit_and_every_cut_is_noticed(tmp_path: Path) -> None:
    data = encode_control_record(RECORD)
    damaged = [data[:size] for size in range(len(data))]
    damaged += [
        data[:index] + bytes([data[index] ^ 1 << bit]) + data[index + 1 :]
        for index in range(len(data))
        for bit in (0, 7)
    ]
    for text in damaged:
        (tmp_path / CONTROL_FILE_NAME).write_bytes(text)
        with pytest.raises(ControlFileDamagedError, match=str(tmp_path)):
            read_control_file(tmp_path)


def test_a_missing_file_is_damage(tmp_path: Path) -> None:
    with pytest.raises(ControlFileDamagedError, match="missing"):
        read_control_file(tmp_path)
