"""Quorum commit: how WAL survives the loss of a minority of its safekeepers. Pure: messages in, effects out.

The problem is a replicated log with one writer at a time. The log is a timeline's WAL; the writer is
a compute's proposer; the replicas are acceptors, one in each safekeeper. It is Raft's log
replication with Paxos's names, as Neon showed it for PostgreSQL, with one twist: replicas never
elect themselves, because only a compute can write WAL. So a *proposer* campaigns, and when a
majority has voted for it, it must continue the log where the best of them ends::

    a proposer's life                         an acceptor's log and history
    -----------------                         -----------------------------
    GREETING   hear promised terms            WAL  |=====|=========|====|..
    CAMPAIGNING  ask for votes in T                0     80        300  340
    LEADING    E := end of the best log       term 1     3         7
               repair who lags, cut who       history [(1,0), (3,80), (7,300)]
               diverges, append, commit
    RENEWING   win back who promised more
    FENCED     someone leads in a higher term

Two facts carry every proof. *Log matching*: an acceptor's bytes below its flush LSN, with its history
cut at that LSN, are a prefix of what the proposer of the last term in it wrote or inherited. *Leader
completeness*: majorities overlap, and voters vote once per term, so the best log of any majority
holds everything that was ever committed.

What these modules promise, by number (docs cite them too):

* **D1** what the proposer calls committed is on disk at a majority, so every later election keeps it;
* **C1** an acceptor never accepts WAL of a term older than the one it has promised;
* **C2** a promise is on disk before it is spoken;
* **C3** an acceptor's commit LSN, which readers may see, never exceeds what is committed.

**Record ends.** Commit LSNs, E, starts of terms and cuts are ends of whole records, because PostgreSQL
and every reader can begin only there. Flush LSNs are bytes: they may lie within a record. An acceptor
that restarts keeps whole records only (a torn one cannot be told from a whole one before its end), so a
flush LSN is worth what it says only up to the record end below it, which no restart takes back. That is
all that a commit counts.

**Skipped WAL.** A member whose WAL ends where nobody's begins any more goes on at a committed LSN below
which all is durable in object storage (D2). Its log then counts as the prefix of the leader's that it
would have been; so that it is one, that LSN must be committed by this leader, or at a member that has
adopted its history.

**Long records.** A record may have a gigabyte, so nobody may have to hold one. The beginning of a
record leaves the proposer's window as soon as a majority has flushed it, committed or not: whoever
lacks it gets it from those. If they restart, and with them the beginning is gone everywhere, no commit
is: nothing of the record was committed, and PostgreSQL keeps all WAL above the commit LSN, so the
window begins there again.

**A leader that was elected without a member** may meet there a higher promise, to a candidate that
never won. It needs that member no more than before, so it goes on. A majority of higher promises ends
it, and so does one member that holds WAL of a newer leader. While neither is so, for some heartbeats in
which a live candidate would have won, it stands for election itself, in a higher term, with its own
log. That is sound: what a leader of a term between has committed is, with its history, at a majority,
hence at one of the voters, who would have shown it; everything else that was ever committed is in its
own log. WAL of the new term begins at the end of a whole record (so that no restart makes a holder of
it look like one of the older term), and nothing is committed before a majority holds WAL up to there
under the new history (Raft's figure 8, as after any election).

Modules: `quorum` (majorities), `term_history` (who wrote which WAL), `acceptor`, `proposer`,
`leader_state` and `members` (what a proposer knows of itself and of others), `wal_window` (the recent
WAL that a proposer's shell keeps in memory), `donors` (who can bring up a member that lags).

How a shell drives a core: call one method per event, then carry out the returned effects *in the
order given*, each finished before the next begins (persist, then speak). If an effect fails (a full
disk), the core is ahead of the disk: throw it away and build a new one from disk, as after a crash.

Not here: I/O, time, tokens; membership change. The members of a timeline are a fixed set: an acceptor
that has lost its disk must not come back as the member it was, since it would have forgotten promises
and WAL that others count on.
"""
