/* How long a read waits for the page server, and how a cancelled query gets out.
 *
 * Signals stay open during a fetch: PostgreSQL's handlers only set flags (or leave the process), and a call that
 * one interrupts is repeated. Which signal came does not matter, and must not: latches use SIGUSR1 and SIGURG all
 * day. What matters is what the handlers noted, so the flags themselves are read: QueryCancelPending (SIGINT, and
 * statement and lock time-outs, which send themselves one) and ProcDiePending (SIGTERM). All of PostgreSQL 14-18 export them; they
 * are weak here, so that another program has none. PostgreSQL repeats a read that fails with EINTR without looking
 * at its flags, so giving up is EIO.
 *
 * The process that replays WAL waits as long as it takes: an error would end the standby, and late it is anyway.
 *
 * A flag does not end a wait at once: a healthy fetch is over in a millisecond and then PostgreSQL itself reports
 * the cancellation. And never in a critical section: there an error would be a PANIC. But PostgreSQL 18 reads relations
 * (not SLRUs) inside a critical section of its own, in which an error is only noted: that one does not count.
 */
#define _GNU_SOURCE
#include "hydrate.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>

#define CANCEL_GRACE_NS 500000000ull

extern volatile sig_atomic_t QueryCancelPending __attribute__((weak));
extern volatile sig_atomic_t ProcDiePending __attribute__((weak));
extern volatile uint32_t CritSectionCount __attribute__((weak));
extern void pgaio_io_perform_synchronously(void *handle) __attribute__((weak)); /* 18 and later */

static bool is_cancelled(const struct patience *patience)
{
    uint32_t harmless = patience->reads_relation && &pgaio_io_perform_synchronously != NULL ? 1 : 0;
    if (&CritSectionCount != NULL && CritSectionCount > harmless)
        return false;
    return (&QueryCancelPending != NULL && QueryCancelPending != 0) ||
           (&ProcDiePending != NULL && ProcDiePending != 0);
}

struct patience patience_of(const struct arena_file *file, uint64_t start_ns)
{
    uint64_t generation = __atomic_load_n(&arena.header->settings_generation, __ATOMIC_ACQUIRE);
    uint64_t deadline_ms = arena.header->settings[generation & 1].deadline_ms;
    return (struct patience){.start_ns = start_ns,
                             .deadline_ns = replays_wal() ? UINT64_MAX : start_ns + deadline_ms * 1000000u,
                             .reads_relation = file->kind == ARENA_RELATION};
}

bool patience_over(struct patience *patience)
{
    uint64_t now = system_now_ns();
    if (patience->ended != NULL)
        return true;
    if (now >= patience->deadline_ns) {
        patience->ended = "the deadline has passed";
        return true;
    }
    if (!is_cancelled(patience))
        return false;
    if (patience->cancelled_ns == 0)
        patience->cancelled_ns = now;
    if (now - patience->cancelled_ns < CANCEL_GRACE_NS)
        return false;
    patience->ended = "the query was cancelled";
    COUNT(cancelled, 1);
    return true;
}

static bool is_connection_outdated(uint32_t generation)
{
    uint64_t current = __atomic_load_n(&arena.header->settings_generation, __ATOMIC_ACQUIRE);
    return arena.header->settings[current & 1].connection_generation != generation;
}

int wait_ready(int fd, short events, uint64_t limit_ns, struct patience *patience, uint32_t generation)
{
    struct pollfd entry = {.fd = fd, .events = events};
    for (;;) {
        uint64_t now = system_now_ns();
        int slice_ms = PATIENCE_SLICE_MS;
        if (limit_ns <= now)
            slice_ms = 0;
        else if (limit_ns - now < PATIENCE_SLICE_MS * 1000000ull)
            slice_ms = (int)((limit_ns - now) / 1000000u) + 1;
        int ready = poll(&entry, fd >= 0 ? 1 : 0, slice_ms);
        if (ready > 0)
            return 1;
        if (ready < 0 && errno != EINTR)
            return -1;
        if (patience_over(patience) || is_connection_outdated(generation))
            return -1;
        if (slice_ms == 0)
            return 0;
    }
}
