/*
 * What the process may still do once it has started: use memory, its pipes and its scratch directory.
 *
 * Redo is PostgreSQL's code, but it is fed with WAL, which a tenant writes: somebody who finds a way to
 * break redo with a record must not gain a process on the page server's machine, nor read what its user may
 * read. Three layers:
 *
 *   limits        memory, files, processes; everywhere
 *   confinement   which files can be opened: only those beneath the scratch directory. By Landlock; where the
 *                 kernel lacks it, by a root directory of its own, for which a user namespace is needed
 *   filter        which system calls can be made; none that makes a connection, starts a program, follows
 *                 another process or changes who may do what
 *
 * The filter cannot see paths, and so does not replace the confinement. The host is told what holds.
 * Whatever lies outside of the scratch directory must have been opened or loaded before.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* O_PATH, CLONE_NEWUSER */
#endif
#include "redo.h"

#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <linux/audit.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/seccomp.h>

/* Two of the longest requests (one in the buffer, one being decoded) and PostgreSQL itself. */
#define ADDRESS_SPACE_MAX ((rlim_t) 2 << 30)
#define OPEN_FILES_MAX 256

/* Names of layers, separated by commas, that are left out: for tests of what remains without them. */
#define WITHOUT_VARIABLE "EXCIMER_REDO_WITHOUT"

static bool
is_left_out(const char *layer)
{
    const char *left_out = getenv(WITHOUT_VARIABLE);

    return left_out != NULL && strstr(left_out, layer) != NULL;
}

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

/*
 * ---- Landlock
 *
 * Declared here, because the headers of supported systems are older than what their kernels may offer.
 * Numbers and structures are the kernel's, linux/landlock.h; the numbers of the calls are the same on all
 * architectures. Fields that a kernel does not know yet must be zero.
 */

#define CALL_CREATE_RULESET 444
#define CALL_ADD_RULE 445
#define CALL_RESTRICT_SELF 446

#define CREATE_RULESET_VERSION 1u
#define RULE_PATH_BENEATH 1

#define FS_WRITE_FILE (UINT64CONST(1) << 1)
#define FS_READ_FILE (UINT64CONST(1) << 2)
#define FS_REMOVE_FILE (UINT64CONST(1) << 5)
#define FS_MAKE_REG (UINT64CONST(1) << 8)
#define FS_TRUNCATE (UINT64CONST(1) << 14)

typedef struct Ruleset
{
    uint64 handled_access_fs;
    uint64 handled_access_net;
    uint64 scoped;
} Ruleset;

typedef struct PathBeneath
{
    uint64 allowed_access;
    int32 parent_fd;
} __attribute__((packed)) PathBeneath;

/* How many kinds of access to files, to the network, and kinds of scopes each version knows, from 1 on. */
static const struct
{
    uint8 fs, net, scopes;
} landlock_versions[] = {{13, 0, 0}, {14, 0, 0}, {15, 0, 0}, {15, 2, 0}, {16, 2, 0}, {16, 2, 2}};

static uint64
lowest_bits(uint8 count)
{
    return (UINT64CONST(1) << count) - 1;
}

/* Answers the version in force; 0 where there is none. Needs no_new_privs. */
static int
confine_by_landlock(void)
{
    long version = syscall(CALL_CREATE_RULESET, NULL, (size_t) 0, CREATE_RULESET_VERSION);
    int known;
    Ruleset ruleset;
    PathBeneath scratch;
    int ruleset_fd, directory_fd;

    if (version < 1 || is_left_out("landlock"))
        return 0;
    known = (int) Min(version, (long) lengthof(landlock_versions)) - 1;
    ruleset.handled_access_fs = lowest_bits(landlock_versions[known].fs);
    ruleset.handled_access_net = lowest_bits(landlock_versions[known].net);
    ruleset.scoped = lowest_bits(landlock_versions[known].scopes);
    scratch.allowed_access = (FS_READ_FILE | FS_WRITE_FILE | FS_MAKE_REG | FS_REMOVE_FILE | FS_TRUNCATE) &
                             ruleset.handled_access_fs;
    ruleset_fd = syscall(CALL_CREATE_RULESET, &ruleset, sizeof ruleset, 0u);
    directory_fd = open(".", O_PATH | O_DIRECTORY | O_CLOEXEC);
    scratch.parent_fd = directory_fd;
    if (ruleset_fd < 0 || directory_fd < 0 ||
        syscall(CALL_ADD_RULE, ruleset_fd, RULE_PATH_BENEATH, &scratch, 0u) != 0 ||
        syscall(CALL_RESTRICT_SELF, ruleset_fd, 0u) != 0)
        elog(FATAL, "Landlock is here but cannot be used: %m");
    close(directory_fd);
    close(ruleset_fd);
    return (int) version;
}

/*
 * Makes the scratch directory the root of all paths. Needs no right of the user, but a kernel and a container
 * that allow user namespaces. The capabilities that come with one are given up at once: with CAP_SYS_CHROOT
 * one gets out again.
 */
static bool
confine_by_root(void)
{
    struct __user_cap_header_struct head = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct none[_LINUX_CAPABILITY_U32S_3] = {{0, 0, 0}};

    if (is_left_out("root") || syscall(SYS_unshare, CLONE_NEWUSER) != 0)
        return false;
    if (syscall(SYS_chroot, ".") != 0 || chdir("/") != 0 || syscall(SYS_capset, &head, none) != 0)
        elog(FATAL, "cannot enter a root directory of our own: %m");
    return true;
}

/* System calls that the buffer manager, the memory manager and the C library make in a running worker. */
static const int allowed_calls[] = {
    SYS_read, SYS_write, SYS_readv, SYS_writev, SYS_pread64, SYS_pwrite64, SYS_preadv, SYS_pwritev,
    SYS_lseek, SYS_openat, SYS_close, SYS_fstat, SYS_ftruncate, SYS_fallocate, SYS_fadvise64,
    SYS_sync_file_range, SYS_fsync, SYS_fdatasync, SYS_unlinkat,
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

/* Of fcntl only these: others send signals to any process of our user, or watch directories. */
static const int allowed_fcntls[] = {F_DUPFD, F_DUPFD_CLOEXEC, F_GETFD, F_SETFD, F_GETFL, F_SETFL};

#if defined(__x86_64__)
#define THIS_ARCHITECTURE AUDIT_ARCH_X86_64
#elif defined(__aarch64__)
#define THIS_ARCHITECTURE AUDIT_ARCH_AARCH64
#endif

#define LOAD(field) \
    (struct sock_filter) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, field))
#define UNLESS_EQUAL(value, skip) (struct sock_filter) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, value, 0, skip)
#define ANSWER(what) (struct sock_filter) BPF_STMT(BPF_RET | BPF_K, what)

static bool
filter_system_calls(void)
{
#ifdef THIS_ARCHITECTURE
    struct sock_filter program[2 * (lengthof(allowed_calls) + lengthof(allowed_fcntls)) + 8];
    struct sock_fprog filter = {.filter = program};
    unsigned short size = 0;

    program[size++] = LOAD(arch);
    program[size++] = (struct sock_filter) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, THIS_ARCHITECTURE, 1, 0);
    program[size++] = ANSWER(SECCOMP_RET_KILL);
    program[size++] = LOAD(nr);
    for (size_t index = 0; index < lengthof(allowed_calls); index++)
    {
        program[size++] = UNLESS_EQUAL(allowed_calls[index], 1);
        program[size++] = ANSWER(SECCOMP_RET_ALLOW);
    }
    program[size++] = UNLESS_EQUAL(SYS_fcntl, 2 * lengthof(allowed_fcntls) + 1);
    program[size++] = LOAD(args[1]); /* its lower half: both architectures are little-endian */
    for (size_t index = 0; index < lengthof(allowed_fcntls); index++)
    {
        program[size++] = UNLESS_EQUAL(allowed_fcntls[index], 1);
        program[size++] = ANSWER(SECCOMP_RET_ALLOW);
    }
    /* An error, not death: an unforeseen harmless call then fails like any other, with a reason to read. */
    program[size++] = ANSWER(SECCOMP_RET_ERRNO | EPERM);
    filter.len = size;
    return prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter) == 0;
#else
    return false;
#endif
}

void
sandbox_enter(Sandbox *sandbox)
{
    bool no_new_privileges = prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0;

    memset(sandbox, 0, sizeof *sandbox);
    if (no_new_privileges)
        sandbox->landlock_version = confine_by_landlock();
    if (sandbox->landlock_version == 0)
        sandbox->has_own_root = confine_by_root();
    lower_limit(RLIMIT_AS, ADDRESS_SPACE_MAX);
    lower_limit(RLIMIT_CORE, 0);
    lower_limit(RLIMIT_NOFILE, OPEN_FILES_MAX);
    lower_limit(RLIMIT_NPROC, 0);
    lower_limit(RLIMIT_FSIZE, (rlim_t) RELSEG_SIZE * BLCKSZ);
    if (no_new_privileges)
        sandbox->is_filtered = filter_system_calls();
}
