"""Starts a program without a copy of our own memory: vfork, and then system calls alone until it is executed.

A fork copies the page tables of the whole process, and whoever runs Python code in it copies pages as well,
some milliseconds of a start each. The C library's way without (posix_spawn) cannot change the user, and
Python's own takes a fork for that.

The child shares our memory until then and may run none of our code: all signals are blocked, and before
they are let through again they have no handlers. The user is changed by the system calls themselves, because
the C library's functions would change it in all threads of the process whose memory it is: ours.

Not here: which user, which environment (`io.processes`).
"""

from cpython.bytes cimport PyBytes_AS_STRING
from libc.errno cimport errno
from libc.stdlib cimport free, malloc

cdef extern from * nogil:
    """
    #include <errno.h>
    #include <fcntl.h>
    #include <signal.h>
    #include <sys/prctl.h>
    #include <sys/syscall.h>
    #include <sys/types.h>
    #include <sys/wait.h>
    #include <unistd.h>

    struct program {
        const char *path;
        char **arguments, **environment;
        const char *directory;
        int streams[3];
        int changes_user;
        unsigned user, group;
        unsigned *groups;
        long group_count;
        int death_signal;
    };

    static void take_default_signals(void) {
        struct sigaction action = {.sa_handler = SIG_DFL}, present;
        for (int number = 1; number < NSIG; number++) {
            int is_kept = sigaction(number, NULL, &present) != 0
                || present.sa_handler == SIG_DFL || present.sa_handler == SIG_IGN;
            if (!is_kept || number == SIGPIPE || number == SIGXFSZ)  /* Python ignores these two */
                sigaction(number, &action, NULL);
        }
    }

    static int take_streams(const int *streams) {
        int lifted[3];
        for (int place = 0; place < 3; place++)  /* so that none is overwritten before it is taken */
            if ((lifted[place] = fcntl(streams[place], F_DUPFD_CLOEXEC, 3)) < 0) return -1;
        for (int place = 0; place < 3; place++)
            if (dup2(lifted[place], place) < 0) return -1;
        return syscall(SYS_close_range, 3u, ~0u, 4u /* CLOSE_RANGE_CLOEXEC */) == 0 ? 0
            : errno == ENOSYS || errno == EINVAL ? 0 /* Python's are closed on exec anyway */ : -1;
    }

    static int change_user(const struct program *program) {
        if (!program->changes_user) return 0;
        if (syscall(SYS_setgroups, program->group_count, program->groups) != 0) return -1;
        if (syscall(SYS_setresgid, program->group, program->group, program->group) != 0) return -1;
        return syscall(SYS_setresuid, program->user, program->user, program->user) == 0 ? 0 : -1;
    }

    static pid_t start_program(const struct program *program) {
        volatile int failure = 0;
        pid_t parent = getpid();
        sigset_t all, before;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        pid_t pid = vfork();
        if (pid == 0) {
            take_default_signals();
            if (setsid() >= 0 && take_streams(program->streams) == 0 && chdir(program->directory) == 0
                && change_user(program) == 0
                && (!program->death_signal || prctl(PR_SET_PDEATHSIG, program->death_signal) == 0)
                && (!program->death_signal || getppid() == parent)  /* or it has died before */
                && sigprocmask(SIG_SETMASK, &before, NULL) == 0)
                execve(program->path, program->arguments, program->environment);
            failure = errno ? errno : ESRCH;
            _exit(127);
        }
        int error = errno;
        pthread_sigmask(SIG_SETMASK, &before, NULL);
        errno = pid < 0 ? error : failure;
        return pid;
    }
    """
    struct program:
        const char *path
        char **arguments
        char **environment
        const char *directory
        int streams[3]
        int changes_user
        unsigned user
        unsigned group
        unsigned *groups
        long group_count
        int death_signal
    int start_program(const program *program)
    int waitpid(int pid, int *status, int options)


def start(
    bytes path not None,
    list arguments not None,
    list environment not None,
    bytes directory not None,
    tuple streams not None,
    user,
    int death_signal,
):
    """Its pid; it is in a session of its own. `streams`: descriptors of input, output and errors. `user`:
    uid, gid and other groups, or None for ours. Blocks until it is executed; raises OSError if it cannot be.
    """
    cdef program what
    cdef char **texts = <char **>malloc((len(arguments) + len(environment) + 2) * sizeof(char *))
    cdef unsigned *groups = <unsigned *>malloc((len(user[2]) + 1 if user else 1) * sizeof(unsigned))
    cdef int pid, error, status
    cdef Py_ssize_t index
    if b"\0" in path or b"\0" in directory:
        raise ValueError("a zero byte in a path")
    if texts == NULL or groups == NULL:
        free(texts)
        free(groups)
        raise MemoryError("no memory to start a program")
    try:
        what.path, what.directory, what.death_signal = path, directory, death_signal
        what.arguments, what.environment = texts, texts + len(arguments) + 1
        _fill(what.arguments, arguments)
        _fill(what.environment, environment)
        for index in range(3):
            what.streams[index] = streams[index]
        what.changes_user, what.groups, what.group_count = user is not None, groups, 0
        if user is not None:
            what.user, what.group, what.group_count = user[0], user[1], len(user[2])
            for index in range(what.group_count):
                groups[index] = user[2][index]
        with nogil:
            pid = start_program(&what)
            error = errno
            if pid > 0 and error:
                waitpid(pid, &status, 0)
        if error:
            raise OSError(error, f"{path.decode(errors='replace')} cannot be started")
        return pid
    finally:
        free(texts)
        free(groups)


cdef void _fill(char **places, list texts) except *:
    cdef Py_ssize_t index
    cdef bytes text
    for index in range(len(texts)):
        text = texts[index]
        if b"\0" in text:
            raise ValueError("a zero byte in an argument or the environment of a program")
        places[index] = PyBytes_AS_STRING(text)
    places[len(texts)] = NULL
