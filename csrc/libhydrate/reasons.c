/* An error number with a sentence: PostgreSQL turns numbers into words by strerror_r(), which gives the sentence
 * instead, once, so that the client reads it.
 */
#define _GNU_SOURCE
#include "hydrate.h"
#include "interposed.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

static char reason[512]; /* for strerror_r(reason_errno); empty: there is none */
static int reason_errno;

extern int __xpg_strerror_r(int number, char *buffer, size_t size);

INTERPOSE(char *, strerror_r, int number, char *buffer, size_t size)
{
    if (reason[0] != '\0' && number == reason_errno) {
        snprintf(buffer, size, "%s", reason);
        static char told[sizeof reason]; /* the buffer is shorter than a sentence may be */
        memcpy(told, reason, sizeof told);
        reason[0] = '\0';
        return told;
    }
    __xpg_strerror_r(number, buffer, size);
    return buffer;
}

void forget_reason(void)
{
    reason[0] = '\0';
}

int fail_because(int number, const char *why)
{
    snprintf(reason, sizeof reason, "%s", why);
    reason_errno = number;
    errno = number;
    return -1;
}
