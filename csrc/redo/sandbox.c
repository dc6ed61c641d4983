/*
 * What the process may still do once it has started: use memory, its pipes and its scratch directory.
 *
 * Redo is PostgreSQL's code, but it is fed with WAL, which a tenant writes: somebody who finds a way to
 * break redo with a record must not gain a process on the page server's machine. Limits hold everywhere;
 * the filter of system calls is added where the kernel has it.
 */
#include "redo.h"

#include <signal.h>
#include <stddef.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>

#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>

/* Two of the longest requests (one in the buffer, one being decoded) and PostgreSQL itself. */
#define ADDRESS_SPACE_MAX ((rlim_t) 2 << 30)
#define OPEN_FILES_MAX 256

static void
lower_limit(int resource, rlim_t value)
{
    struct rlimit limit;

    if (getrlimit(resource, &limit) != 0)
        return;
    if (limit.rlim_max == RLIM_INFINITY || limit.rlim_max > value)
        limit.rlim_max = value;
    limit.rlim_cur = Min(value, limit.rlim_max);
    if (setrlimit(resource, &limit) != 0)
        elog(FATAL, "cannot lower the limit of resource %d: %m", resource);
}

/* System calls that the buffer manager, the memory manager and the C library make in a running worker. */
static const int allowed_calls[] = {
    SYS_read, SYS_write, SYS_readv, SYS_writev, SYS_pread64, SYS_pwrite64, SYS_preadv, SYS_pwritev,
    SYS_lseek, SYS_openat, SYS_close, SYS_fstat, SYS_ftruncate, SYS_fallocate, SYS_fadvise64,
    SYS_sync_file_range, SYS_fsync, SYS_fdatasync, SYS_fcntl, SYS_unlinkat,
    SYS_mmap, SYS_munmap, SYS_mremap, SYS_madvise, SYS_brk,
    SYS_futex, SYS_rt_sigprocmask, SYS_rt_sigreturn, SYS_setitimer, SYS_nanosleep, SYS_clock_nanosleep,
    SYS_clock_gettime, SYS_gettimeofday, SYS_getpid, SYS_gettid, SYS_getrusage, SYS_getrandom,
    SYS_exit, SYS_exit_group,
#ifdef SYS_open
    SYS_open, SYS_unlink, SYS_stat, SYS_lstat, SYS_alarm, SYS_time,
#endif
#ifdef SYS_newfstatat
    SYS_newfstatat,
#endif
#ifdef SYS_statx
    SYS_statx,
#endif
};

#if defined(__x86_64__)
#define THIS_ARCHITECTURE AUDIT_ARCH_X86_64
#elif defined(__aarch64__)
#define THIS_ARCHITECTURE AUDIT_ARCH_AARCH64
#endif

static bool
filter_system_calls(void)
{
#ifdef THIS_ARCHITECTURE
    struct sock_filter program[2 * lengthof(allowed_calls) + 5];
    struct sock_fprog filter = {.filter = program};
    unsigned short size = 0;

    program[size++] = (struct sock_filter) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, arch));
    program[size++] = (struct sock_filter) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, THIS_ARCHITECTURE, 1, 0);
    program[size++] = (struct sock_filter) BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL);
    program[size++] = (struct sock_filter) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr));
    for (size_t index = 0; index < lengthof(allowed_calls); index++)
    {
        program[size++] = (struct sock_filter) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, allowed_calls[index], 0, 1);
        program[size++] = (struct sock_filter) BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
    }
    /* An error, not death: an unforeseen harmless call then fails like any other, with a reason to read. */
    program[size++] = (struct sock_filter) BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM);
    filter.len = size;
    return prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter) == 0;
#else
    return false;
#endif
}

bool
sandbox_enter(void)
{
    lower_limit(RLIMIT_AS, ADDRESS_SPACE_MAX);
    lower_limit(RLIMIT_CORE, 0);
    lower_limit(RLIMIT_NOFILE, OPEN_FILES_MAX);
    lower_limit(RLIMIT_NPROC, 0);
    lower_limit(RLIMIT_FSIZE, (rlim_t) RELSEG_SIZE * BLCKSZ);
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0)
        return false;
    return filter_system_calls();
}
