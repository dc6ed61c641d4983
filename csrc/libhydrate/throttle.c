/* How a compute that writes more WAL than its page server ingests is slowed: bulk writers first, readers never.
 *
 *   every system call of a backend that holds no LWLock      throttle_bulk()    waits for its tickets
 *   a write to pg_wal                                         wait_wal_limit()   waits for the limit
 *
 * A process knows how much WAL it has made (pgWalUsage). What is above a small allowance is bulk: it takes tickets,
 * one a byte, from a counter that all processes share, and waits until the manager has allowed so many. Who waits
 * holds no LWLock, because those hold off interrupts, and is in no critical section: nobody waits for it but who
 * wants to extend the same relation. What is owed still when a wait ends, by an interrupt or because it was long, is
 * waited for at the next call.
 *
 * Not all WAL is made by processes that call the system: deleting what is cached does not. The limit of pg_wal is for
 * those. Its wait holds WALWriteLock, so that all writers wait: it is the bound, not the way to slow anybody.
 *
 * The manager says what is allowed (excimer.compute.backpressure_plan), and lifts both before it stops PostgreSQL.
 */
#define _GNU_SOURCE
#include "hydrate.h"

#include <errno.h>
#include <signal.h>

#define STEP_BYTES (64u << 10)
#define ALLOWANCE_BYTES_PER_S (512u << 10)
#define ALLOWANCE_BYTES_MAX (256u << 10)
#define BULK_WAIT_NS_MAX 5000000000ull
#define SLICE_MS 100
#define UNLIMITED UINT64_MAX

/* The beginning of struct WalUsage, the same in 14-18. */
struct wal_usage {
    int64_t records;
    int64_t images;
    uint64_t bytes;
};

extern struct wal_usage pgWalUsage __attribute__((weak));
extern volatile uint32_t InterruptHoldoffCount __attribute__((weak));
extern volatile uint32_t CritSectionCount __attribute__((weak));
extern volatile sig_atomic_t InterruptPending __attribute__((weak));

/* Of this process. */
static uint64_t counted_bytes; /* of its WAL, tickets taken or allowed */
static uint64_t ticket;        /* the last one taken; 0: nothing is owed */
static uint64_t allowance_bytes;
static uint64_t allowance_ns; /* when it was last refilled */

bool in_critical_section(void)
{
    return &CritSectionCount != NULL && CritSectionCount > 0;
}

static bool may_wait(void)
{
    return &InterruptHoldoffCount != NULL && InterruptHoldoffCount == 0 && !in_critical_section();
}

/* A cancellation, a termination, or somebody who needs an answer of all processes. */
static bool is_interrupted(void)
{
    return &InterruptPending != NULL && InterruptPending != 0;
}

static uint64_t allowed_tickets(void)
{
    return __atomic_load_n(&arena.header->throttle.allowed, __ATOMIC_ACQUIRE);
}

/* How much of `bytes` is above the allowance, which is used up. */
static uint64_t take_allowance(uint64_t bytes, uint64_t now)
{
    uint64_t passed_ns = now - allowance_ns;
    allowance_ns = now;
    if (passed_ns >= 1000000000u)
        allowance_bytes = ALLOWANCE_BYTES_MAX;
    else
        allowance_bytes += passed_ns * ALLOWANCE_BYTES_PER_S / 1000000000u;
    if (allowance_bytes > ALLOWANCE_BYTES_MAX)
        allowance_bytes = ALLOWANCE_BYTES_MAX;
    uint64_t free_bytes = bytes < allowance_bytes ? bytes : allowance_bytes;
    allowance_bytes -= free_bytes;
    return bytes - free_bytes;
}

static void wait_for_ticket(uint64_t start_ns)
{
    struct arena_throttle *throttle = &arena.header->throttle;
    uint64_t now = start_ns;
    while (now - start_ns < BULK_WAIT_NS_MAX && !is_interrupted()) {
        uint32_t seen = __atomic_load_n(&throttle->tick, __ATOMIC_ACQUIRE);
        if (allowed_tickets() >= ticket) {
            ticket = 0;
            break;
        }
        system_futex_wait(&throttle->tick, seen, SLICE_MS);
        now = system_now_ns();
    }
    now = system_now_ns();
    if (now - start_ns > 1000000u) {
        COUNT(bulk_waits, 1);
        COUNT(bulk_wait_ns, now - start_ns);
    }
}

void throttle_bulk(void)
{
    if (arena.header == NULL || &pgWalUsage == NULL)
        return;
    uint64_t bytes = pgWalUsage.bytes - counted_bytes;
    if ((bytes < STEP_BYTES && ticket == 0) || !may_wait())
        return;
    int error = errno;
    uint64_t now = system_now_ns();
    if (bytes >= STEP_BYTES) {
        counted_bytes += bytes;
        uint64_t bulk_bytes = take_allowance(bytes, now);
        if (bulk_bytes > 0 && allowed_tickets() != UNLIMITED)
            ticket = __atomic_add_fetch(&arena.header->throttle.taken, bulk_bytes, __ATOMIC_RELAXED);
    }
    if (ticket != 0)
        wait_for_ticket(now);
    errno = error;
}

void wait_wal_limit(uint64_t end_lsn)
{
    struct arena_throttle *throttle = &arena.header->throttle;
    if (end_lsn <= __atomic_load_n(&throttle->wal_limit_lsn, __ATOMIC_ACQUIRE))
        return;
    int error = errno;
    uint64_t start_ns = system_now_ns();
    for (;;) {
        uint32_t seen = __atomic_load_n(&throttle->tick, __ATOMIC_ACQUIRE);
        if (end_lsn <= __atomic_load_n(&throttle->wal_limit_lsn, __ATOMIC_ACQUIRE))
            break;
        system_futex_wait(&throttle->tick, seen, SLICE_MS);
    }
    COUNT(wal_waits, 1);
    COUNT(wal_wait_ns, system_now_ns() - start_ns);
    errno = error;
}
