/* Several processes read, write, cut and lengthen the same lazy files while one after the other is killed.
 *
 *   torture PROCESSES SECONDS KILL_EVERY_MS SEED [PAGES]   (in the data directory; exit status 1: something was wrong)
 *
 * A shared model holds each block's expected generation, 0 being the page server's content. Record locks
 * on another file stand in for PostgreSQL's buffer and relation locks: exclusive for changes, shared for reads. A
 * writer that is killed in the middle leaves "unknown". Unlocked reads play the prefetcher: their results mean nothing,
 * but they hydrate, at the worst moments.
 *
 * With PAGES, where the page server has its files, one of the processes evicts, and is killed in turn. Even generations are
 * written there first, as WAL that is ingested at once. Odd ones never are, and their LSN says so: they must stay.
 */
#define _GNU_SOURCE
#include "calls.h"

#include "../hydrate.h"

static void lose_the_processor(void);
#define EVICTION_STEP(name) lose_the_processor()
#include "../eviction.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define BLOCK 8192
#define LSN_MAX (1ull << 62)
#define FILES 3
#define BLOCKS 600
#define GROWTH 60
#define BLOCKS_LEAST 100
#define READ_MAX 16
#define PROCESSES_MAX 16
#define UNKNOWN UINT32_MAX
#define FILE_LOCKS 100000

struct model {
    volatile uint32_t expected[FILES][BLOCKS + GROWTH];
    volatile uint32_t size[FILES];
    volatile uint32_t hot[FILES]; /* where somebody has just prefetched: the place to write to */
    uint32_t generation, wrong, reads, writes, truncations, extensions, evicted;
};

static const char *pages_dir;
static int ingested[FILES];

volatile sig_atomic_t QueryCancelPending, ProcDiePending;
volatile uint32_t CritSectionCount;

ssize_t __real_system_pwrite(int fd, const void *bytes, size_t size, off_t offset);
ssize_t __wrap_system_pwrite(int fd, const void *bytes, size_t size, off_t offset);

/* Now and then a process loses the processor just before it installs or writes. */
static void lose_the_processor(void)
{
    if (random() % 8 == 0)
        usleep((useconds_t)(random() % 2000));
}

ssize_t __wrap_system_pwrite(int fd, const void *bytes, size_t size, off_t offset)
{
    lose_the_processor();
    return __real_system_pwrite(fd, bytes, size, offset);
}

ssize_t __real_system_pread(int fd, void *bytes, size_t size, off_t offset);
ssize_t __wrap_system_pread(int fd, void *bytes, size_t size, off_t offset);

/* Or between its look at the map and its read. */
ssize_t __wrap_system_pread(int fd, void *bytes, size_t size, off_t offset)
{
    if (pages_dir != NULL)
        lose_the_processor();
    return __real_system_pread(fd, bytes, size, offset);
}

static struct model *model;
static int lock_fd;
static int files[FILES];
static uint64_t pages[READ_MAX][BLOCK / 8];

static const char *path_of(int file)
{
    static char path[32];
    snprintf(path, sizeof path, "base/5/%d", 1000 + file);
    return path;
}

static uint64_t tag_of(int file, int block, uint32_t generation)
{
    return (uint64_t)generation << 40 | (uint64_t)(file + 1) << 32 | (uint64_t)(generation & 1) << 31 | (uint64_t)block;
}

static void lock(int file, int block, int count, int type)
{
    struct flock range = {.l_type = (short)type, .l_whence = SEEK_SET, .l_start = (off_t)file * FILE_LOCKS + block,
                          .l_len = count};
    while (fcntl(lock_fd, F_SETLKW, &range) < 0 && errno == EINTR)
        ;
}

static void wrong(const char *what, int file, int block)
{
    __atomic_fetch_add(&model->wrong, 1, __ATOMIC_RELAXED);
    fprintf(stderr, "file %d block %d: %s\n", file, block, what);
}

static void check_page(int file, int block, const uint64_t *page)
{
    uint32_t generation = model->expected[file][block];
    if (generation == UNKNOWN)
        return;
    for (int index = 0; index < BLOCK / 8; index++)
        if (page[index] != tag_of(file, block, generation)) {
            fprintf(stderr, "expected generation %u, found %#llx at %d\n", generation,
                    (unsigned long long)page[index], index);
            wrong("wrong content", file, block);
            return;
        }
}

static void read_checked(int file)
{
    static int next[FILES];
    if (random() % 20 == 0)
        next[file] = (int)(random() % BLOCKS);
    int count = 1 + (int)(random() % READ_MAX), block = next[file];
    lock(file, block, count, F_RDLCK);
    ssize_t got = preloaded_pread(files[file], pages, (size_t)count * BLOCK, (off_t)block * BLOCK);
    int left = (int)model->size[file] - block, wanted = left < 0 ? 0 : left < count ? left : count;
    if (got != (ssize_t)wanted * BLOCK)
        wrong("wrong length of a read", file, block);
    else
        for (int index = 0; index < wanted; index++)
            check_page(file, block + index, pages[index]);
    lock(file, block, count, F_UNLCK);
    next[file] = block + count < BLOCKS ? block + count : 0;
    __atomic_fetch_add(&model->reads, 1, __ATOMIC_RELAXED);
}

static void read_unlocked(int file)
{
    int block = random() % 2 ? (int)(random() % BLOCKS) : (int)model->size[file] - (int)(random() % 60);
    model->hot[file] = (uint32_t)block;
    preloaded_posix_fadvise(files[file], (off_t)(block > 9 ? block - 9 : 0) * BLOCK, 4 * BLOCK, POSIX_FADV_WILLNEED);
    preloaded_pread(files[file], pages, (size_t)(1 + random() % READ_MAX) * BLOCK, (off_t)(block > 0 ? block : 0) * BLOCK);
}

static void write_page(int file, int block)
{
    uint32_t generation = __atomic_add_fetch(&model->generation, 1, __ATOMIC_RELAXED);
    for (int index = 0; index < BLOCK / 8; index++)
        pages[0][index] = tag_of(file, block, generation);
    model->expected[file][block] = UNKNOWN;
    if (pages_dir != NULL && generation % 2 == 0 && pwrite(ingested[file], pages, BLOCK, (off_t)block * BLOCK) != BLOCK)
        wrong("short write of the page server's", file, block);
    if (preloaded_pwrite(files[file], pages, BLOCK, (off_t)block * BLOCK) != BLOCK)
        wrong("short write", file, block);
    model->expected[file][block] = generation;
}

static void overwrite(int file)
{
    int block = (int)(random() % 2 ? (uint32_t)(random() % BLOCKS) : model->hot[file] + (uint32_t)(random() % READ_MAX));
    lock(file, block, 1, F_WRLCK);
    if (block < (int)model->size[file]) {
        write_page(file, block);
        __atomic_fetch_add(&model->writes, 1, __ATOMIC_RELAXED);
    }
    lock(file, block, 1, F_UNLCK);
}

static void cut(int file)
{
    lock(file, 0, FILE_LOCKS - 10, F_WRLCK);
    uint32_t before = model->size[file], after = before - (uint32_t)(random() % 20);
    if (after >= BLOCKS_LEAST && after < before) {
        if (preloaded_ftruncate(files[file], (off_t)after * BLOCK) < 0)
            wrong("truncation failed", file, (int)after);
        model->size[file] = after;
        model->truncations++;
    }
    lock(file, 0, FILE_LOCKS - 10, F_UNLCK);
}

static void lengthen(int file)
{
    lock(file, 0, FILE_LOCKS - 10, F_WRLCK);
    for (int count = 0; count < 12 && model->size[file] < BLOCKS + GROWTH; count++) {
        write_page(file, (int)model->size[file]);
        model->size[file]++;
        model->extensions++;
    }
    lock(file, 0, FILE_LOCKS - 10, F_UNLCK);
}

static void reopen(int file)
{
    preloaded_close(files[file]);
    files[file] = preloaded_open(path_of(file), O_RDWR | O_CLOEXEC);
}

static void evict(void)
{
    static struct eviction eviction;
    eviction.header = arena.header;
    eviction.begins_epochs = 1;
    eviction.arena_fd = open(getenv("EXCIMER_ARENA"), O_RDWR | O_CLOEXEC);
    eviction.data_dir_fd = open(".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    for (;;) {
        eviction.ingested_lsn = LSN_MAX;
        eviction_sweep(&eviction, (uint64_t)(1 + random() % 60));
        eviction_settle(&eviction, LSN_MAX, 1);
        __atomic_fetch_add(&model->evicted, (uint32_t)eviction.evicted, __ATOMIC_RELAXED);
        usleep((useconds_t)(random() % 5000));
    }
}

static void open_ingested(void)
{
    char path[1024];
    for (int file = 0; file < FILES; file++) {
        snprintf(path, sizeof path, "%s/%s", pages_dir, path_of(file));
        ingested[file] = open(path, O_RDWR | O_CLOEXEC);
    }
}

static void work(unsigned seed)
{
    srandom(seed);
    lock_fd = open("locks", O_RDWR | O_CLOEXEC);
    for (int file = 0; file < FILES; file++)
        files[file] = preloaded_open(path_of(file), O_RDWR | O_CLOEXEC);
    for (;;) {
        int file = (int)(random() % FILES), dice = (int)(random() % 1000);
        if (dice < 80)
            read_unlocked(file);
        else if (dice < 800)
            read_checked(file);
        else if (dice < 980)
            overwrite(file);
        else if (dice < 988)
            cut(file);
        else if (dice < 998)
            lengthen(file);
        else
            reopen(file);
    }
}

/* The first of them evicts, if anybody does. */
static pid_t start(int index, unsigned seed)
{
    pid_t pid = fork();
    if (pid != 0)
        return pid;
    if (index == 0 && pages_dir != NULL) {
        srandom(seed);
        evict();
    }
    work(seed);
    return 0;
}

/* Not while it changes a size: the model's size and the file's would part, which real relation locks prevent by a
 * crash of everything. */
static void kill_one(pid_t pid)
{
    for (int file = 0; file < FILES; file++)
        lock(file, FILE_LOCKS - 20, 1, F_RDLCK);
    kill(pid, SIGKILL);
    waitpid(pid, NULL, 0);
    for (int file = 0; file < FILES; file++)
        lock(file, FILE_LOCKS - 20, 1, F_UNLCK);
}

int main(int count, char **arguments)
{
    if (count != 5 && count != 6)
        return 2;
    pages_dir = count == 6 ? arguments[5] : NULL;
    if (pages_dir != NULL)
        open_ingested();
    int processes = atoi(arguments[1]), kills = 0;
    time_t end = time(NULL) + atoi(arguments[2]);
    useconds_t pause = (useconds_t)atoi(arguments[3]) * 1000;
    unsigned seed = (unsigned)atoi(arguments[4]);
    pid_t workers[PROCESSES_MAX];
    model = mmap(NULL, sizeof *model, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    lock_fd = open("locks", O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    for (int file = 0; file < FILES; file++)
        model->size[file] = BLOCKS;
    srandom(seed);
    for (int index = 0; index < processes; index++)
        workers[index] = start(index, seed + (unsigned)index);
    while (time(NULL) < end && model->wrong == 0) {
        int index = (int)(random() % processes);
        usleep(pause);
        kill_one(workers[index]);
        workers[index] = start(index, seed + 100 + (unsigned)++kills);
    }
    for (int index = 0; index < processes; index++)
        kill_one(workers[index]);
    printf("wrong %u reads %u writes %u truncations %u extensions %u kills %d evicted %u\n", model->wrong, model->reads,
           model->writes, model->truncations, model->extensions, kills, model->evicted);
    return model->wrong != 0;
}
