"""SQL that makes PostgreSQL write records of every resource manager: pages, and all that is not a page."""

from excimer.postgres import PostgresBuild
from tests.kit import redo_workload
from tests.kit.stock_server import StockServer

MANY_SUBTRANSACTIONS = """
do $$ begin
  for i in 1..2100 loop
    begin insert into subxact_t values (i); exception when raise_exception then null; end;
  end loop;
end $$;
"""
"""The record that ends their transaction has more than a page: ingest of these tests takes it in parts."""

LIFE = f"""
create table subxact_t(id int);
do $$ begin
  for i in 1..150 loop
    begin
      insert into subxact_t values (i);
      if i % 7 = 0 then raise exception 'rolled back'; end if;
    exception when raise_exception then null;
    end;
  end loop;
end $$;
{MANY_SUBTRANSACTIONS}
begin; {MANY_SUBTRANSACTIONS} rollback;
begin; create table rolled_back_t as select 1 as a; rollback;
create table dropped_t as select g, repeat('d', 100) as d from generate_series(1, 500) g;
drop table dropped_t;
create table truncated_t as select g, repeat('t', 100) as t from generate_series(1, 3000) g;
vacuum (freeze) truncated_t;
delete from truncated_t where g > 700;
vacuum truncated_t;
insert into truncated_t select g, 'again' from generate_series(1, 4000) g;
vacuum truncated_t;
delete from truncated_t;
vacuum truncated_t;
create table emptied_t as select g from generate_series(1, 1000) g;
truncate emptied_t;
insert into emptied_t values (1);
create unlogged table unlogged_t(id int primary key, v text);
insert into unlogged_t select g, 'u' from generate_series(1, 300) g;
alter table unlogged_t set logged;
create unlogged table unlogged_2(id int primary key);
insert into unlogged_2 values (1);
select pg_logical_emit_message(true, 'test', 'a message'), pg_logical_emit_message(false, 'test', 'one');
select pg_create_restore_point('somewhere');
vacuum full pg_class;
vacuum full pg_database;
reindex table pg_attribute;
select pg_switch_wal();
select lo_create(0), lo_create(0);
"""

TWO_PHASE = f"""
begin; {MANY_SUBTRANSACTIONS} prepare transaction 'long';
begin; {MANY_SUBTRANSACTIONS} prepare transaction 'long and left';
commit prepared 'long';
begin; insert into subxact_t values (1001);
savepoint a; insert into subxact_t values (1002); savepoint b; insert into subxact_t values (1003);
prepare transaction 'committed later';
begin; create table prepared_t as select 1 as a; drop table emptied_t;
prepare transaction 'rolled back later';
begin; insert into subxact_t values (1004); prepare transaction 'left';
checkpoint;
commit prepared 'committed later';
rollback prepared 'rolled back later';
begin; insert into subxact_t values (1005); prepare transaction 'left as well';
"""

ORIGINS = """
create table applied_t(id int);
select pg_replication_origin_create('origin ' || g) from generate_series(1, 5) g;
select pg_replication_origin_session_setup('origin 1');
begin; select pg_replication_origin_xact_setup('0/1000', '2026-01-01');
insert into applied_t values (1); commit;
begin; select pg_replication_origin_xact_setup('0/3000', '2026-01-01');
insert into applied_t values (2); commit;
begin; select pg_replication_origin_xact_setup('0/2000', '2026-01-01');
insert into applied_t values (3); commit;
begin; select pg_replication_origin_xact_setup('0/4000', '2026-01-01');
insert into applied_t values (4); rollback;
insert into applied_t values (5);
select pg_replication_origin_session_reset(), pg_replication_origin_session_setup('origin 2');
begin; select pg_replication_origin_xact_setup('0/5000', '2026-01-01');
insert into applied_t values (6);
prepare transaction 'of an origin';
begin; select pg_replication_origin_xact_setup('0/6000', '2026-01-01');
insert into applied_t values (7);
prepare transaction 'of an origin, in vain';
begin; select pg_replication_origin_xact_setup('0/7000', '2026-01-01');
insert into applied_t values (8);
prepare transaction 'of an origin, left';
select pg_replication_origin_session_reset(), pg_replication_origin_session_setup('origin 3');
commit prepared 'of an origin';
rollback prepared 'of an origin, in vain';
select pg_replication_origin_session_reset();
select pg_replication_origin_advance('origin 4', 'A/9000');
select pg_replication_origin_advance('origin 5', '0/9000');
select pg_replication_origin_advance('origin 4', 'A/8000');
select pg_replication_origin_drop('origin 5');
"""

MULTIXACTS = """
create table locked_t(id int primary key, v int);
insert into locked_t select g, 0 from generate_series(1, 200) g;
do $$ begin
  for i in 1..1500 loop
    perform 1 from locked_t where id = 1 + i % 200 for key share;
    begin
      update locked_t set v = v + 1 where id = 1 + i % 200;
      if i % 3 = 0 then raise exception 'rolled back'; end if;
    exception when raise_exception then null;
    end;
  end loop;
end $$;
"""

DATABASES = """
create table in_template(id int primary key, t text);
insert into in_template select g, repeat('t', g % 50) from generate_series(1, 2000) g;
vacuum in_template;
update in_template set t = 'changed' where id % 3 = 0;
"""


def compression(build: PostgresBuild) -> dict[str, str]:
    """Another one for each version, as far as the build has it."""
    if build.version < 15:
        return {"wal_compression": "on"}
    if build.version == 16 and build.features.lz4:
        return {"wal_compression": "lz4"}
    if build.version == 17 and build.features.zstd:
        return {"wal_compression": "zstd"}
    return {"wal_compression": "off" if build.version == 18 else "pglz"}


def run(server: StockServer) -> None:
    """About ten seconds."""
    server.sql(redo_workload.SETUP)
    if "bloom" in server.build.features.extensions:
        server.sql(redo_workload.BLOOM)
    server.sql(LIFE)
    server.sql(redo_workload.ROUND.format(round=1))
    server.sql(MULTIXACTS)
    server.sql(TWO_PHASE)
    server.sql(ORIGINS)
    _databases(server)
    server.sql(redo_workload.ROUND.format(round=2))
    server.sql(redo_workload.END)
    server.sql("vacuum (freeze); select pg_current_wal_lsn()")


def _databases(server: StockServer) -> None:
    strategies = ["", " strategy file_copy", " strategy wal_log"] if server.build.version >= 15 else [""]
    server.sql("create database origin")
    server.sql(DATABASES, "origin")
    for number, strategy in enumerate(strategies):
        server.sql(f"create database copy_{number} template origin{strategy}")
        server.sql("update in_template set t = 'in the copy' where id % 5 = 0", f"copy_{number}")
    server.sql("insert into in_template select g, 'later' from generate_series(3000, 3500) g", "origin")
    server.sql("drop database copy_0")
    server.sql(f"create database copy_0 template origin{strategies[0]}")
