/* What a read leaves behind: marks for the evictor (eviction.h), and numbers for whoever looks. */
#define _GNU_SOURCE
#include "hydrate.h"

#define READS_KEPT 128u

static uint32_t reads_kept; /* counted here first: a shared counter on every read would be a crowded place */

static void count_reads(uint64_t blocks, uint64_t missed)
{
    reads_kept += (uint32_t)blocks;
    if (missed != 0)
        COUNT(read_misses, missed);
    if (reads_kept >= READS_KEPT || missed != 0) {
        COUNT(reads, reads_kept);
        reads_kept = 0;
    }
}

__attribute__((destructor)) static void flush_reads(void)
{
    if (arena.header != NULL && reads_kept != 0)
        COUNT(reads, reads_kept);
    reads_kept = 0;
}

/* Marks a present block as read; false: it is absent. */
static inline bool touch(const struct arena_file *file, uint64_t block)
{
    uint8_t *byte = presence_of(file, block);
    if (byte == NULL)
        return true;
    uint8_t value = __atomic_load_n(byte, __ATOMIC_ACQUIRE);
    if ((value & ARENA_PRESENT) == 0)
        return false;
    if ((value & ARENA_AHEAD) != 0)
        __atomic_fetch_and(byte, (uint8_t)~ARENA_AHEAD, __ATOMIC_RELAXED);
    else if ((value & ARENA_TOUCHED) == 0)
        __atomic_fetch_or(byte, ARENA_TOUCHED, __ATOMIC_RELAXED);
    return true;
}

int hydrate_for_read(int fd, off_t offset, size_t size)
{
    const struct open_file *open_file = open_file_of(fd);
    if (open_file == NULL)
        return 0;
    const struct arena_file *file = open_file->file;
    struct block_range range = blocks_of(file, offset, size);
    uint64_t missed = 0;
    for (uint64_t block = range.block; block < range.end; block++)
        missed += arena.header->evicts != 0 ? !touch(file, block) : !is_present(file, block);
    if (size > 0)
        count_reads((size + BLOCK_SIZE - 1) / BLOCK_SIZE, missed);
    return missed == 0 ? 0 : hydrate(fd, first_absent(file, range.block, range.end), range.end);
}

/* For the endpoint module: bound, use, reads, misses, evictions. False: there is no arena. */
__attribute__((visibility("default"))) bool excimer_cache_numbers(uint64_t *numbers, int count);
bool excimer_cache_numbers(uint64_t *numbers, int count)
{
    if (arena.header == NULL)
        return false;
    const struct arena_statistics *statistics = &arena.header->statistics;
    uint64_t all[] = {arena.header->cache.limit_bytes, arena.header->cache.used_bytes, statistics->reads + reads_kept,
                      statistics->read_misses, statistics->evicted};
    for (int index = 0; index < count && index < (int)(sizeof all / sizeof *all); index++)
        numbers[index] = __atomic_load_n(&all[index], __ATOMIC_RELAXED);
    return true;
}
