/*
 * A compute's own module, preloaded into its stock PostgreSQL: the few rules that no setting and no system call can
 * make. Each file is one rule; `module.c` puts them in force. It is compiled on the machine where it runs, against the
 * headers of the build that loads it (`excimer.postgres.endpoint_module`), for PostgreSQL 14 to 18.
 *
 * Not here: blocks and files (csrc/libhydrate), redo (csrc/redo).
 */
#ifndef EXCIMER_ENDPOINT_H
#define EXCIMER_ENDPOINT_H

#include "postgres.h"

#if PG_VERSION_NUM < 140000 || PG_VERSION_NUM >= 190000
#error "the endpoint module is written for PostgreSQL 14 to 18"
#endif

/* What a logical replication worker commits waits for the quorum (apply_commits.c). */
extern void guard_apply_commits(void);

/* Statements that this storage cannot serve are refused, and errors get the hint that helps (statements.c). */
extern void guard_statements(void);

/* The manager gets in, whatever its role has lost (superuser_login.c). */
extern void guard_superuser_login(void);

/* Clients are counted, and turned away during a suspend (admission.c). */
extern void define_admission_settings(void);
extern void guard_admission(void);

/* What acts on the outside by itself waits, or is not started (background_work.c). */
extern void define_background_settings(void);
extern void guard_background_work(void);

/* Init forks of unlogged indexes are in WAL (init_forks.c). */
extern void guard_init_forks(void);

/* How far a standby has replayed WAL is told to libhydrate (replay.c). */
extern void tell_replay(void);

/* What the local cache does, as settings that only show (cache_statistics.c). */
extern void define_cache_settings(void);

/* Which blocks are in shared buffers at a shutdown is written down (hot_buffers.c). */
extern void keep_hot_buffers(void);

/* Given by the compute's manager: which command brings an extension that this build lacks. */
extern char *extension_hint;

#endif
