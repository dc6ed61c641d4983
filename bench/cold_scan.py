"""[cold_scan_mb_s] The first sequential scan of a compute that has nothing yet.

`select count(*)` over one table, PostgreSQL's default parallelism, on an endpoint that was stopped and
started before each round, so that its data directory is new and every page comes from the pageserver. The
table was written by one INSERT; the pageserver has it in layers and has compacted what it wants to. The
pageserver's own cache of layers is warm. Size over time of the statement, 1 MB = 10^6 bytes.
"""

import time

from bench.excimer_stack import ENDPOINT, measured_stack
from bench.model import Bench, Samples

TABLE = "create table scanned(key int, moment timestamptz, value int, filler text)"
FILL = (
    "insert into scanned select g, timestamptz '2026-01-01' + g * interval '1 second', g % 1000,"
    " repeat(md5(g::text), 2)"
    " from generate_series(1, {rows}) g"
)


def measure(bench: Bench) -> Samples:
    rates = []
    with measured_stack() as ours:
        ours.target.sql(TABLE, FILL.format(rows=bench.effort.scan_rows), "vacuum (freeze, analyze) scanned")
        ours.settle()
        size_bytes = int(ours.target.sql("select pg_relation_size('scanned')"))
        for _ in range(bench.effort.rounds):
            ours.restart()
            with ours.stack.connect(ENDPOINT) as connection:
                begun = time.monotonic()
                connection.execute("select count(*) from scanned")
                rates.append(size_bytes / (time.monotonic() - begun) / 1e6)
    rounds = ", ".join(f"{rate:.0f}" for rate in rates)
    bench.note(f"cold scan of {size_bytes / 1e6:.0f} MB, MB/s: {rounds}")
    return {"cold_scan_mb_s": rates}
