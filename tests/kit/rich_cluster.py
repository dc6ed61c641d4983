"""A cluster with a bit of everything that an import must carry, and how two clusters are compared."""

import re

from tests.kit.stock_server import StockServer

SCHEMA = """
create table account (id int primary key, owner text not null, balance numeric(12, 2), at timestamptz);
insert into account
    select n, 'owner ' || n, n * 1.25, timestamptz '2026-01-01' + n * interval '1 minute'
    from generate_series(1, 4000) n;
create index account_owner_hash on account using hash (owner);
create index account_at_brin on account using brin (at);
create table document (id bigserial primary key, words tsvector, place point, name text, tags int[]);
insert into document (words, place, name, tags)
    select to_tsvector('english', 'word' || n % 97 || ' and word' || n % 89), point(n % 50, n / 50),
        md5(n::text), array[n, n % 7, n % 13]
    from generate_series(1, 3000) n;
create index document_words_gin on document using gin (words);
create index document_tags_gin on document using gin (tags);
create index document_place_gist on document using gist (place);
create index document_place_spgist on document using spgist (place);
create index document_name_spgist on document using spgist (name);
create table measure (day date not null, n int, note text) partition by range (day);
create table measure_2025 partition of measure for values from ('2025-01-01') to ('2026-01-01');
create table measure_2026 partition of measure for values from ('2026-01-01') to ('2027-01-01');
create table measure_rest partition of measure default;
create index measure_n on measure (n);
insert into measure
    select date '2025-01-01' + n % 900, n, repeat('m', n % 50) from generate_series(1, 3000) n;
create unlogged table scratch (id int primary key, note text);
insert into scratch select n, 'gone after a crash' from generate_series(1, 500) n;
create table large (id int, body text);
alter table large alter body set storage external;
insert into large select n, repeat(md5(n::text), 1000) from generate_series(1, 20) n;
create table shrunk (id int, filler text);
insert into shrunk select n, repeat('s', 500) from generate_series(1, 3000) n;
delete from shrunk where id > 100;
vacuum shrunk;
create sequence counter start 17 increment 3;
select nextval('counter') from generate_series(1, 50);
select lo_from_bytea(200000 + n, decode(repeat(md5(n::text), 200), 'hex')) from generate_series(1, 20) n;
create materialized view owners as select owner, count(*) from account group by owner;
create role reader;
grant select on account to reader;
create database other;
"""

OTHER_SCHEMA = """
create table elsewhere as select n as id, md5(n::text) as word from generate_series(1, 2000) n;
create index elsewhere_word on elsewhere (word);
create function twice(n int) returns int language sql as 'select 2 * n';
"""


def fill(server: StockServer) -> None:
    """Two databases, large objects, all kinds of indexes, partitions, an unlogged table, sequences."""
    server.sql(SCHEMA)
    server.sql(OTHER_SCHEMA, "other")


DUMP_OPTIONS = ("--no-unlogged-table-data",)
AMCHECK_OPTIONS = ("--all", "--install-missing", "--heapallindexed", "--parent-check")


def comparable(dump: str) -> str:
    """A dump without the key that newer versions draw at random."""
    return re.sub(r"(?m)^\\(un)?restrict \S+$", "", dump)
