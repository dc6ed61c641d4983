/* Read-ahead: how many blocks to fetch when one is missing.
 *
 * A file remembers a few streams, each the block that a sequential reader would miss next and how much the last miss
 * fetched. A miss at or shortly after that block doubles the window; any other starts a new stream with one block,
 * in place of the weakest. They are shared by all processes, because the workers of a parallel scan take turns; they
 * are updated without locks, because a lost update costs one smaller fetch.
 */
#include "hydrate.h"

#define FIRST_WINDOW_AT_START 4u

static uint32_t next_of(uint64_t stream)
{
    return (uint32_t)(stream >> 32);
}

static uint32_t window_of(uint64_t stream)
{
    return (uint32_t)stream;
}

static uint64_t load_stream(const struct arena_file *file, uint32_t index)
{
    return __atomic_load_n(&file->streams[index], __ATOMIC_RELAXED);
}

/* The stream that expects a miss at `block`, or ARENA_STREAMS. */
static uint32_t stream_expecting(const struct arena_file *file, uint32_t block, uint32_t blocks_max)
{
    for (uint32_t index = 0; index < ARENA_STREAMS; index++) {
        uint64_t stream = load_stream(file, index);
        if (window_of(stream) != 0 && block >= next_of(stream) && block - next_of(stream) < blocks_max)
            return index;
    }
    return ARENA_STREAMS;
}

uint32_t read_ahead_window(struct arena_file *file, uint32_t block, uint32_t blocks_max)
{
    uint32_t window = block == 0 ? FIRST_WINDOW_AT_START : 1;
    uint32_t index = stream_expecting(file, block, blocks_max);
    if (index < ARENA_STREAMS)
        window = 2 * window_of(load_stream(file, index));
    return window < blocks_max ? window : blocks_max;
}

void read_ahead_advance(struct arena_file *file, uint32_t block, uint32_t next, uint32_t window)
{
    uint32_t chosen = stream_expecting(file, block, ARENA_READ_AHEAD_MAX);
    if (chosen == ARENA_STREAMS) {
        chosen = 0;
        for (uint32_t index = 1; index < ARENA_STREAMS; index++)
            if (window_of(load_stream(file, index)) < window_of(load_stream(file, chosen)))
                chosen = index;
    }
    __atomic_store_n(&file->streams[chosen], (uint64_t)next << 32 | window, __ATOMIC_RELAXED);
}
