/* Prefetch hints: posix_fadvise(WILLNEED) on absent blocks.
 *
 * PostgreSQL announces the blocks of a bitmap heap scan some way ahead. A hint is only remembered, which
 * never stalls; the next miss of the same process on the same file sends the remembered requests together with its own,
 * so that they share one round trip and the server works on them at once. A hint that no miss follows costs nothing.
 *
 * Rejected: fetching at once in a helper process. It has to be started, watched and stopped with PostgreSQL, and it loses
 * against the reader that arrives a moment later anyway.
 */
#include "hydrate.h"

#define HINTS_MAX 256u

struct hint {
    const struct arena_file *file;
    uint32_t block;
    uint32_t count;
};

static struct hint hints[HINTS_MAX];
static uint32_t newest; /* number of hints ever remembered; the last HINTS_MAX are kept */
static uint32_t oldest;

void remember_hint(const struct arena_file *file, uint64_t block, uint64_t end)
{
    struct hint *last = &hints[(newest - 1) % HINTS_MAX];
    COUNT(hints, end - block);
    if (newest != oldest && last->file == file && last->block + last->count == block &&
        last->count + (end - block) <= RUN_BLOCKS_MAX) {
        last->count += (uint32_t)(end - block);
        return;
    }
    while (block < end) {
        uint64_t count = end - block < RUN_BLOCKS_MAX ? end - block : RUN_BLOCKS_MAX;
        if (newest - oldest == HINTS_MAX)
            oldest++;
        hints[newest++ % HINTS_MAX] = (struct hint){file, (uint32_t)block, (uint32_t)count};
        block += count;
    }
}

/* The first absent stretch of a hint that does not touch the needed run. */
static struct run useful_part(const struct hint *hint, const struct run *needed)
{
    uint64_t block = hint->block, end = block + hint->count, needed_end = (uint64_t)needed->block + needed->count;
    if (block < needed->block && end > needed->block)
        end = needed->block;
    else if (block >= needed->block && block < needed_end)
        block = needed_end < end ? needed_end : end;
    block = first_absent(hint->file, block, end);
    uint64_t stop = block;
    while (stop < end && !is_present(hint->file, stop))
        stop++;
    return (struct run){(uint32_t)block, (uint32_t)(stop - block), false};
}

uint32_t take_hints(const struct arena_file *file, const struct run *needed, struct run *runs, uint32_t capacity)
{
    uint32_t taken = 0, kept = oldest;
    for (uint32_t index = oldest; index != newest; index++) {
        struct hint hint = hints[index % HINTS_MAX];
        if (hint.file != file || taken == capacity) {
            hints[kept++ % HINTS_MAX] = hint;
            continue;
        }
        struct run run = useful_part(&hint, needed);
        if (run.count > 0)
            runs[taken++] = run;
    }
    newest = kept;
    return taken;
}
