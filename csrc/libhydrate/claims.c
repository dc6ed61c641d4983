/* Claims and locks are POSIX record locks on ranges of the arena file: the kernel drops them when their
 * owner dies, so no block can stay in "loading" (H1).
 *
 * A block has two lockable bytes, both past the end of the file. Who holds its *claim* is fetching the block,
 * so that a hundred readers of one block ask once. Nothing but a second fetch depends on it. Who holds its *install
 * lock* may change the block in the local file, or take it out. It is never held over the network, so
 * that no write and no truncation ever waits for a page server. Where the cache is not bounded, writes of present
 * blocks do without: then nobody takes a block out.
 *
 * A process waits for an install lock only while it holds no other, so there is no deadlock.
 */
#define _GNU_SOURCE
#include "hydrate.h"

#include <errno.h>
#include <fcntl.h>

#define CLAIMS_OFFSET (1ll << 48)
#define ADOPTION_OFFSET 0 /* a byte of the header */

static int record_lock(int command, short type, off_t offset, uint64_t size)
{
    struct flock lock = {.l_type = type, .l_whence = SEEK_SET, .l_start = offset, .l_len = (off_t)size};
    int result;
    do
        result = system_fcntl(arena.fd, command, &lock);
    while (result < 0 && errno == EINTR && command == F_SETLKW);
    return result;
}

static off_t block_offset(const struct arena_file *file, uint64_t block)
{
    return (off_t)((uint64_t)(file - arena.files) * ARENA_SEGMENT_BLOCKS + block);
}

bool try_claim(const struct arena_file *file, uint64_t block, uint64_t count)
{
    return record_lock(F_SETLK, F_WRLCK, CLAIMS_OFFSET + block_offset(file, block), count) == 0;
}

void release_claim(struct arena_file *file, uint64_t block, uint64_t count)
{
    record_lock(F_SETLK, F_UNLCK, CLAIMS_OFFSET + block_offset(file, block), count);
    __atomic_fetch_add(&file->wake, 1, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&file->waiters, __ATOMIC_SEQ_CST) != 0)
        system_futex_wake_all(&file->wake);
}

int lock_install(const struct arena_file *file, uint64_t block, uint64_t count)
{
    return record_lock(F_SETLKW, F_WRLCK, ARENA_INSTALL_LOCKS + block_offset(file, block), count);
}

void unlock_install(const struct arena_file *file, uint64_t block, uint64_t count)
{
    int error = errno;
    record_lock(F_SETLK, F_UNLCK, ARENA_INSTALL_LOCKS + block_offset(file, block), count);
    errno = error;
}

static off_t state_offset(const struct arena_file *file)
{
    return (off_t)((const char *)file - (const char *)arena.header);
}

int lock_state(const struct arena_file *file)
{
    return record_lock(F_SETLKW, F_WRLCK, state_offset(file), 1);
}

void unlock_state(const struct arena_file *file)
{
    int error = errno;
    record_lock(F_SETLK, F_UNLCK, state_offset(file), 1);
    errno = error;
}

int lock_adoption(void)
{
    return record_lock(F_SETLKW, F_WRLCK, ADOPTION_OFFSET, 1);
}

void unlock_adoption(void)
{
    int error = errno;
    record_lock(F_SETLK, F_UNLCK, ADOPTION_OFFSET, 1);
    errno = error;
}
