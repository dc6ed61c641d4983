"""SQL that makes PostgreSQL write every kind of record that changes pages, small enough for a test.

Run with full_page_writes=off, so that the chains of records are whole.
"""

SETUP = """
create table heap_t(id bigserial primary key, k int, v text, pad text)
  with (fillfactor=75, autovacuum_enabled=off);
create index heap_k on heap_t(k);
create index heap_v on heap_t(v);
create table parent_t(id int primary key, x int);
insert into parent_t select g, 0 from generate_series(1, 100) g;
create table child_t(id bigserial primary key, p int references parent_t(id), note text);
create table gin_t(id serial primary key, a int[], ts tsvector);
create index gin_a on gin_t using gin(a) with (fastupdate=on, gin_pending_list_limit=64);
create index gin_ts on gin_t using gin(ts) with (fastupdate=off);
create table gist_t(id serial primary key, p point, b box, r int4range);
create index gist_p on gist_t using gist(p);
create index gist_b on gist_t using gist(b);
create index gist_r on gist_t using gist(r);
create index gist_buffered on gist_t using gist(p) with (buffering=on);
create table spgist_t(id serial primary key, p point, t text, ip inet);
create index spgist_p on spgist_t using spgist(p);
create index spgist_kd on spgist_t using spgist(p kd_point_ops);
create index spgist_text on spgist_t using spgist(t);
create index spgist_ip on spgist_t using spgist(ip);
create table hash_t(id serial, a int, t text);
create index hash_a on hash_t using hash(a);
create index hash_text on hash_t using hash(t);
create table brin_t(id bigserial, ts timestamptz, v int, s text);
create index brin_ts on brin_t using brin(ts) with (pages_per_range=2);
create index brin_v on brin_t using brin(v) with (pages_per_range=1);
create index brin_many on brin_t using brin(v int4_minmax_multi_ops) with (pages_per_range=4);
create index brin_bloom on brin_t using brin(id int8_bloom_ops) with (pages_per_range=8);
create table toast_t(id serial primary key, d text);
alter table toast_t alter d set storage external;
create sequence sequence_1;
create sequence sequence_2 cache 5;
create table copied_t(id int, x text);
"""

BLOOM = """
create extension bloom;
create table bloom_t(a int, b int, c text);
create index bloom_i on bloom_t using bloom(a, b, c);
insert into bloom_t select g, g * 7 % 1000, md5(g::text) from generate_series(1, 1500) g;
delete from bloom_t where a % 3 = 0;
vacuum bloom_t;
insert into bloom_t select g, g % 17, 'again' from generate_series(1, 200) g;
"""

ROUND = """
insert into heap_t(k, v, pad)
  select (g * 7919 + {round}) % 5000, md5((g * {round})::text), repeat('x', g % 100)
  from generate_series(1, 1200) g;
update heap_t set pad = repeat('y', (id % 90)::int) where k % 11 = {round};
update heap_t set v = md5(id::text || '{round}') where k % 13 = {round};
delete from heap_t where k % 17 = {round};
begin;
insert into child_t(p, note) select 1 + g % 100, 'n' from generate_series(1, 150) g;
savepoint a;
update parent_t set x = x + 1 where id % 3 = {round} % 3;
rollback to a;
select count(*) from (select * from parent_t where id < 50 for key share) q;
update parent_t set x = x + 2 where id % 2 = {round} % 2;
commit;
begin;
select count(*) from (select * from heap_t where k < 40 for update) q;
rollback;
insert into gin_t(a, ts)
  select array[g % 50, g % 777, g], to_tsvector('simple', md5((g % 200)::text) || ' w' || g % 40)
  from generate_series(1, 700) g;
update gin_t set a = a || 5 where id % 29 = {round};
delete from gin_t where id % 7 = {round};
insert into gist_t(p, b, r)
  select point(g * 31 % 997, g * 17 % 991), box(point(g % 91, g), point(g % 91 + 1, g + 2)),
         int4range(g % 500, g % 500 + 10)
  from generate_series(1, 700) g;
delete from gist_t where id % 9 = {round};
insert into spgist_t(p, t, ip)
  select point(g * 13 % 983, g * 7 % 977), 'pre/' || g % 30 || '/' || md5(g::text),
         ('10.' || g % 256 || '.' || g * 7 % 256 || '.1')::inet
  from generate_series(1, 700) g;
delete from spgist_t where id % 8 = {round};
insert into hash_t(a, t) select g * {round}, md5(g::text) from generate_series(1, 900) g;
delete from hash_t where id % 6 = {round};
insert into brin_t(ts, v, s)
  select timestamptz '2024-01-01' + g * interval '1 min', g * {round} % 1000, repeat('s', g % 200)
  from generate_series(1, 900) g;
update brin_t set v = -{round} where id % 61 = 0;
insert into toast_t(d) select repeat(md5(g::text), 20 + g * 11 % 200) from generate_series(1, 15) g;
update toast_t set d = d || 'z' where id % 3 = 0;
select count(nextval('sequence_1')), count(nextval('sequence_2')) from generate_series(1, 40) g;
vacuum heap_t;
vacuum gin_t;
vacuum gist_t;
vacuum spgist_t;
vacuum hash_t;
vacuum brin_t;
checkpoint;
"""

END = """
copy copied_t from program 'seq 1 3000 | sed "s/$/\\tcopied/"';
vacuum (freeze) copied_t;
delete from copied_t where id between 500 and 900;
vacuum copied_t;
insert into copied_t select g, 'again' from generate_series(1, 600) g;
begin;
create table frozen_t(id int, x text);
copy frozen_t from program 'seq 1 3000 | sed "s/$/\\tfrozen/"' with (freeze on);
commit;
update frozen_t set x = 'u' where id % 500 = 0;
delete from heap_t where id between 800 and 2200;
vacuum heap_t;
delete from gist_t where id between 100 and 1500;
vacuum gist_t;
delete from hash_t where id % 2 = 0;
vacuum hash_t;
vacuum (freeze) child_t;
select brin_summarize_new_values('brin_ts'), brin_summarize_new_values('brin_v'),
       brin_summarize_new_values('brin_many'), brin_desummarize_range('brin_v', 0);
create index heap_late on heap_t(k, v);
create index gin_late on gin_t using gin(a);
create index gist_late on gist_t using gist(p);
create index spgist_late on spgist_t using spgist(t);
create index hash_late on hash_t using hash(a);
create index brin_late on brin_t using brin(id);
insert into heap_t(k, v, pad) select g, md5(g::text), 'late' from generate_series(1, 500) g;
update heap_t set pad = 'last' where k % 7 = 0;
reindex index heap_v;
update heap_t set pad = 'cleared' where k between 100 and 130;
"""

RELATIONS = """
select coalesce(nullif(c.reltablespace, 0), 1663),
       case when c.reltablespace = 1664 then 0
            else (select oid from pg_database where datname = current_database()) end,
       pg_relation_filenode(c.oid), c.relname, c.relkind, coalesce(a.amname, '-'), c.relpersistence
from pg_class c left join pg_am a on a.oid = c.relam
where pg_relation_filenode(c.oid) is not null
"""
