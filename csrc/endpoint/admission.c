/*
 * Clients are counted as they log in, and turned away while their endpoint is being suspended.
 *
 * The manager suspends an endpoint that nobody uses. Between its look at who is there and the shutdown somebody may
 * come, and a fast shutdown would cut that session in the middle of its work. So both sides share 16 bytes, in a file of
 * the data directory that every process of PostgreSQL has mapped:
 *
 *     logins    how many clients have been let in, or wait to be
 *     state     open; held: the manager looks once more; shut: it is going to end PostgreSQL; starting: not open yet
 *
 *     client    counts itself,  then reads the state:   open: goes in   held: waits   shut: refused, SQLSTATE 57P03
 *     manager   sets it to held, looks, then reads the count: as before: shut         another one: open again
 *
 * Either the manager sees the client's count, or the client sees that the door is held or shut; never does a client go in
 * that the manager has not seen. The count also tells of sessions that began and ended between two looks.
 *
 * The manager's own connections do not count: they come as the bootstrap superuser, by the socket that only the
 * installation's user may use, under a name that begins with excimer_.
 */
#include "endpoint.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "catalog/pg_authid.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "storage/latch.h"
#include "utils/acl.h"
#include "utils/guc.h"
#include "utils/timestamp.h"

/* As in superuser_login.c. */
#undef ENABLE_GSS
#undef USE_OPENSSL
#undef USE_SSL
#include "libpq/auth.h"
#include "libpq/libpq-be.h"

/* Same as in excimer.compute.admission. */
struct admission {
    uint64 logins;
    uint32 state;
    uint32 unused;
};

#define STATE_OPEN 0
#define STATE_HELD 1
#define STATE_SHUT 2
#define STATE_STARTING 3 /* a login's own time limit ends this wait, too: nobody goes in */

#define OWN_NAMES "excimer_"
#define HELD_POLL_MS 2
#define HELD_MS_MAX 10000 /* twice what the manager allows itself: it has lost its way, and clients must not */

static char *admission_file = NULL;
static struct admission *admission = NULL;
static ClientAuthentication_hook_type authenticate_before = NULL;

void define_admission_settings(void)
{
    DefineCustomStringVariable("excimer.admission_file", "Where logins are counted, and held during a suspend.", NULL,
                               &admission_file, "", PGC_POSTMASTER, GUC_NO_SHOW_ALL | GUC_NOT_IN_SAMPLE, NULL, NULL,
                               NULL);
}

static bool is_managers(Port *port)
{
    return port->raddr.addr.ss_family == AF_UNIX && port->application_name != NULL &&
           strncmp(port->application_name, OWN_NAMES, strlen(OWN_NAMES)) == 0 &&
           get_role_oid(port->user_name, true) == BOOTSTRAP_SUPERUSERID;
}

static uint32 wait_while_held(void)
{
    TimestampTz since = GetCurrentTimestamp();
    uint32 state;

    for (;;) {
        state = __atomic_load_n(&admission->state, __ATOMIC_SEQ_CST);
        bool is_held_long = TimestampDifferenceExceeds(since, GetCurrentTimestamp(), HELD_MS_MAX);
        if (state != STATE_STARTING && (state != STATE_HELD || is_held_long))
            return state;
        (void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH, HELD_POLL_MS, PG_WAIT_EXTENSION);
        ResetLatch(MyLatch);
        CHECK_FOR_INTERRUPTS();
    }
}

static void authenticate(Port *port, int status)
{
    if (authenticate_before != NULL)
        authenticate_before(port, status);
    if (status != STATUS_OK || is_managers(port))
        return;
    (void) __atomic_add_fetch(&admission->logins, 1, __ATOMIC_SEQ_CST);
    if (wait_while_held() == STATE_SHUT)
        ereport(FATAL, (errcode(ERRCODE_CANNOT_CONNECT_NOW), errmsg("the endpoint is being suspended"),
                        errhint("Nobody used it. Start it and try again.")));
}

static struct admission *map_file(const char *path)
{
    int file = open(path, O_RDWR | O_CLOEXEC);
    void *mapped;

    if (file < 0)
        ereport(FATAL, (errcode_for_file_access(), errmsg("could not open file \"%s\": %m", path)));
    mapped = mmap(NULL, sizeof(struct admission), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (mapped == MAP_FAILED)
        ereport(FATAL, (errcode_for_file_access(), errmsg("could not map file \"%s\": %m", path)));
    close(file);
    return mapped;
}

void guard_admission(void)
{
    if (admission_file == NULL || admission_file[0] == '\0')
        return;
    admission = map_file(admission_file);
    authenticate_before = ClientAuthentication_hook;
    ClientAuthentication_hook = authenticate;
}
