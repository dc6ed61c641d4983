#define _GNU_SOURCE
#include "hydrate.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <unistd.h>

void report(const char *format, ...)
{
    char line[1024];
    int error = errno;
    int size = snprintf(line, sizeof line, "libhydrate [%d]: ", system_getpid());
    va_list arguments;
    va_start(arguments, format);
    int more = vsnprintf(line + size, sizeof line - (size_t)size - 1, format, arguments);
    va_end(arguments);
    size += more < 0 ? 0 : more;
    if (size > (int)sizeof line - 2)
        size = (int)sizeof line - 2;
    line[size++] = '\n';
    ssize_t written = system_write(STDERR_FILENO, line, (size_t)size);
    (void)written; /* if stderr is gone, nobody is left to tell */
    errno = error;
}
