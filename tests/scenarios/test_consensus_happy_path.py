"""One proposer, three acceptors, a perfect network: elect, write, commit."""

from excimer.base.ids import NodeId, TenantId, TimelineId
from excimer.base.lsn import Lsn
from excimer.consensus import acceptor as acceptors
from excimer.consensus import proposer as proposers
from excimer.consensus.wal_window import WalWindow
from excimer.wire.safekeeping import ProposerId, TimelineIdentity

IDENTITY = TimelineIdentity(
    tenant_id=TenantId("aa" * 16),
    timeline_id=TimelineId("bb" * 16),
    pg_version=18,
    system_id=7,
    wal_segment_size_bytes=1 << 24,
)


def test_smoke() -> None:
    members = [
        acceptors.Acceptor(
            node_id=NodeId(i + 1),
            identity=IDENTITY,
            timeline_start_lsn=Lsn(100),
            state=acceptors.AcceptorState.bootstrap(Lsn(100)),
            recovered_end_lsn=Lsn(100),
        )
        for i in range(3)
    ]
    proposer = proposers.Proposer(
        identity=IDENTITY, proposer_id=ProposerId(b"p" * 16), token="t", member_count=3
    )
    window = WalWindow(Lsn(0))
    seen: list[proposers.ProposerEffect] = []

    def run(effects: list[proposers.ProposerEffect]) -> None:
        nonlocal window
        for effect in effects:
            seen.append(effect)
            if isinstance(effect, proposers.Elected):
                window = WalWindow(effect.start_lsn)
            elif isinstance(effect, proposers.Send):
                answer(effect.peer, members[effect.peer].receive(acceptors.ConnectionId(1), effect.message))
            elif isinstance(effect, proposers.SendWal):
                message = effect.message(window.slice(effect.begin_lsn, effect.end_lsn))
                answer(effect.peer, members[effect.peer].receive(acceptors.ConnectionId(1), message))

    def answer(peer: int, effects: list[acceptors.AcceptorEffect]) -> None:
        for effect in effects:
            if isinstance(effect, acceptors.FlushWal):
                answer(peer, members[peer].wal_flushed(effect, effect.end_lsn))
            elif isinstance(effect, acceptors.Send):
                run(proposer.receive(peer, effect.message))

    for peer in range(3):
        run(proposer.peer_connected(peer))
    assert proposer.phase is proposers.Phase.LEADING
    assert proposer.commit_lsn == 100
    window.append(b"x" * 50)
    run(proposer.wal_appended(window.end_lsn, Lsn(140)))
    assert proposer.commit_lsn == 140
    assert [member.flush_lsn for member in members] == [150] * 3
    assert [member.state.commit_lsn for member in members] == [140] * 3
