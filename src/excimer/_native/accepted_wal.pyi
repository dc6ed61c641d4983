from enum import IntEnum

class Verdict(IntEnum):
    OLDER_TERM = ...
    NOT_ADOPTED = ...
    LEAVES_GAP = ...
    NOTHING_NEW = ...
    NEW_WAL = ...

class AcceptedWal:
    promised_term: int
    adopted_term: int
    write_lsn: int
    flush_lsn: int
    last_record_end_lsn: int
    announced_commit_lsn: int
    commit_lsn: int
    horizon_lsn: int
    streaming_connection: int
    """-1 for nobody."""
    def judge_append(
        self,
        connection: int,
        term: int,
        begin_lsn: int,
        end_lsn: int,
        *,
        commit_lsn: int,
        horizon_lsn: int,
    ) -> Verdict: ...
    def report_flush(self, end_lsn: int, last_record_end_lsn: int) -> bool: ...
    def announce(self, commit_lsn: int, horizon_lsn: int) -> None: ...
