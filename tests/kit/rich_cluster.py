"""A cluster with a bit of everything that whatever carries a cluster must carry, and how two are compared.

Two databases, large objects, unlogged and partitioned tables, every kind of index, TOAST, sequences,
materialised views, a schema of its own, multixacts, a function and a role with a password.
"""

import re

from tests.kit.stock_server import StockServer

ROLES = "create role reader login password 'secret'; grant pg_read_all_data to reader"

STATEMENTS = (
    "create table plain (key int primary key, value text, at timestamptz default '2026-01-01')",
    "insert into plain select i, repeat('value ' || i, 20) from generate_series(1, 4000) i",
    "create index plain_hash on plain using hash (key)",
    "create index plain_brin on plain using brin (key)",
    "create table wide (key int generated always as identity, document text)",
    # Not compressible, so that it is really moved out of line.
    "insert into wide (document) select string_agg(md5((i * 100 + j)::text), '') "
    "from generate_series(1, 20) i, generate_series(1, 400) j group by i",
    "create table words (text tsvector, tags int[])",
    "insert into words select to_tsvector('simple', 'word' || i || ' all'), array[i, i % 7] "
    "from generate_series(1, 1000) i",
    "create index words_gin on words using gin (text)",
    "create index words_tags on words using gin (tags)",
    "create index words_gist on words using gist (text)",
    "create table labels (label text)",
    "insert into labels select md5(i::text) from generate_series(1, 3000) i",
    "create index labels_hash on labels using hash (label)",
    "create index labels_spgist on labels using spgist (label)",
    "create table points (place point)",
    "insert into points select point(i % 97, i % 89) from generate_series(1, 2000) i",
    "create index points_gist on points using gist (place)",
    "create index points_spgist on points using spgist (place)",
    "create table measures (region text, amount int) partition by list (region)",
    "create table measures_north partition of measures for values in ('north')",
    "create table measures_south partition of measures for values in ('south')",
    "create table measures_rest partition of measures default",
    "create index on measures (amount)",
    "insert into measures select (array['north', 'south', 'west'])[i % 3 + 1], i "
    "from generate_series(1, 3000) i",
    "create table days (day date not null, note text) partition by range (day)",
    "create table days_2025 partition of days for values from ('2025-01-01') to ('2026-01-01')",
    "create table days_2026 partition of days for values from ('2026-01-01') to ('2027-01-01')",
    "insert into days select date '2025-01-01' + i % 700, repeat('d', 30) from generate_series(1, 2000) i",
    "create table shrunk (key int, filler text)",
    "insert into shrunk select i, repeat('s', 500) from generate_series(1, 3000) i",
    "delete from shrunk where key > 100",
    "vacuum shrunk",
    "create unlogged table volatile (key int primary key, value text)",
    "insert into volatile select i, 'lost' from generate_series(1, 500) i",
    "create sequence numbers start 100",
    "select nextval('numbers') from generate_series(1, 50)",
    # WAL runs up to 32 values ahead of a sequence that counts, and every copy made from WAL with it.
    "select setval('numbers', 150), setval('wide_key_seq', 20)",
    "create materialized view summary as select region, sum(amount) from measures group by region",
    "create table pending (key int primary key)",
    "create schema other create table held (id uuid, data jsonb)",
    "insert into other.held select md5(i::text)::uuid, jsonb_build_object('i', i) "
    "from generate_series(1, 500) i",
    "select lo_from_bytea(0, decode(repeat('deadbeef', 5000), 'hex')) from generate_series(1, 5)",
    "create function twice(n int) returns int language sql as 'select 2 * n'",
    "delete from plain where key % 5 = 0",
    "update plain set value = value || '!' where key % 7 = 0",
    "vacuum plain",
)

LATER_STATEMENTS = (
    "insert into plain select i, 'later' from generate_series(10001, 12000) i",
    "update measures set amount = amount + 1",
    "drop table points",
    "truncate words",
    "select lo_create(0)",
    "create table later as select i from generate_series(1, 1000) i",
)
"""What a moment in the past must not show."""

DUMP_OPTIONS = ("--no-unlogged-table-data",)
AMCHECK_OPTIONS = ("--all", "--install-missing", "--heapallindexed", "--parent-check")


def fill(server: StockServer) -> None:
    """Everything, in the databases `postgres` and `second`."""
    server.sql(f"{ROLES}; create database second".replace(";", ";\n"))
    for database in ("postgres", "second"):
        server.sql(";\n".join(STATEMENTS), database)


def comparable(dump: str) -> str:
    """A dump without the key that minor releases from August 2025 on draw at random, and without the
    superuser's password: an endpoint gives one to a superuser that has none.
    """
    dump = re.sub(r"(?m)^\\(un)?restrict \S+$", "", dump)
    return re.sub(r"(?m)^(ALTER ROLE postgres WITH .*) PASSWORD '[^']*';$", r"\1;", dump)
