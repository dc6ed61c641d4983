/* Read-ahead: how many blocks to fetch when one is missing.
 *
 * A file remembers a few streams, each the block that a sequential reader would miss next and how much the last miss
 * fetched. A miss near that block belongs to the stream: from it on, it doubles the window; a little before it (the
 * workers of a parallel scan take turns, and one of them is late) it keeps the window. Any other miss starts a new stream
 * with one block, in place of the weakest. Streams are shared by all processes and updated without locks, because a lost
 * update costs one smaller fetch.
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

/* The stream that a miss at `block` belongs to, or ARENA_STREAMS. */
static uint32_t stream_near(const struct arena_file *file, uint32_t block)
{
    for (uint32_t index = 0; index < ARENA_STREAMS; index++) {
        uint64_t stream = load_stream(file, index);
        uint64_t reach = 2 * (uint64_t)window_of(stream);
        if (block + reach >= next_of(stream) && block < next_of(stream) + reach)
            return index;
    }
    return ARENA_STREAMS;
}

uint32_t read_ahead_window(const struct arena_file *file, uint32_t block, uint32_t blocks_max)
{
    uint32_t window = block == 0 ? FIRST_WINDOW_AT_START : 1;
    uint32_t index = stream_near(file, block);
    if (index < ARENA_STREAMS) {
        uint64_t stream = load_stream(file, index);
        window = block < next_of(stream) ? window_of(stream) : 2 * window_of(stream);
    }
    return window < blocks_max ? window : blocks_max;
}

void read_ahead_advance(struct arena_file *file, uint32_t block, uint32_t next, uint32_t window)
{
    uint32_t chosen = stream_near(file, block);
    if (chosen < ARENA_STREAMS && next <= next_of(load_stream(file, chosen)))
        return; /* the late one: the stream is further on already */
    if (chosen == ARENA_STREAMS) {
        chosen = 0;
        for (uint32_t index = 1; index < ARENA_STREAMS; index++)
            if (window_of(load_stream(file, index)) < window_of(load_stream(file, chosen)))
                chosen = index;
    }
    __atomic_store_n(&file->streams[chosen], (uint64_t)next << 32 | window, __ATOMIC_RELAXED);
}
