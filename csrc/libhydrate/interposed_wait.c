/* A commit that waits for the quorum cannot be cancelled into success.
 *
 * PostgreSQL answers a cancelled wait for its synchronous standby with a warning and COMMIT: the row is safe on the
 * local disk, it thinks. Here the local disk is a cache, so the client would hold an acknowledgement for what only a
 * doomed directory has (D1). The wait sleeps on its latch while interrupts are held off, as nothing else that can be
 * cancelled does; a cancellation that is found then comes too late and is forgotten. Termination still works: it closes
 * the connection without an answer.
 *
 * Not covered: a cancellation that arrives after the last check of the statement and before the wait begins, within the
 * microseconds of writing the commit record. A session's own `synchronous_commit = off` is its own choice.
 */
#define _GNU_SOURCE
#include "hydrate.h"
#include "interposed.h"

#include <signal.h>
#include <sys/epoll.h>

extern volatile sig_atomic_t QueryCancelPending __attribute__((weak));
extern volatile uint32_t InterruptHoldoffCount __attribute__((weak));

INTERPOSE(int, epoll_wait, int fd, struct epoll_event *events, int capacity, int timeout_ms)
{
    throttle_bulk(); /* between two statements, as a rule */
    int ready = system_epoll_wait(fd, events, capacity, timeout_ms);
    if (&InterruptHoldoffCount != NULL && &QueryCancelPending != NULL && InterruptHoldoffCount > 0)
        QueryCancelPending = 0;
    return ready;
}
