/*
 * What the local cache does, for SQL: settings that nobody can set, in pg_settings and for SHOW.
 *
 * A view would be rows in every database's catalog, and in its WAL. The numbers are those of the arena, which belongs
 * to libhydrate (csrc/libhydrate/hydration.c): all processes together, since PostgreSQL's start.
 */
#include "endpoint.h"

#include "utils/guc.h"

/* In the order of libhydrate's excimer_cache_numbers(). */
enum { SIZE, USED, READS, MISSES, EVICTED, NUMBERS };

extern bool excimer_cache_numbers(uint64 *numbers, int count) __attribute__((weak));

static char *shown[NUMBERS + 1];

static const char *show_number(int index)
{
    static char text[32];
    uint64 numbers[NUMBERS] = {0};

    if (&excimer_cache_numbers == NULL || !excimer_cache_numbers(numbers, NUMBERS))
        return "";
    snprintf(text, sizeof text, UINT64_FORMAT, numbers[index]);
    return text;
}

static const char *show_size(void)
{
    return show_number(SIZE);
}

static const char *show_used(void)
{
    return show_number(USED);
}

static const char *show_reads(void)
{
    return show_number(READS);
}

static const char *show_misses(void)
{
    return show_number(MISSES);
}

static const char *show_evicted(void)
{
    return show_number(EVICTED);
}

/* Of blocks that were read, how many were here: 0 to 1, and nothing before the first read. */
static const char *show_hit_rate(void)
{
    static char text[32];
    uint64 numbers[NUMBERS] = {0};

    if (&excimer_cache_numbers == NULL || !excimer_cache_numbers(numbers, NUMBERS) || numbers[READS] == 0)
        return "";
    snprintf(text, sizeof text, "%.4f", 1.0 - (double) Min(numbers[MISSES], numbers[READS]) / (double) numbers[READS]);
    return text;
}

static void define(const char *name, const char *description, int index, GucShowHook show)
{
    DefineCustomStringVariable(name, description, NULL, &shown[index], "", PGC_INTERNAL,
                               GUC_NOT_IN_SAMPLE | GUC_DISALLOW_IN_FILE, NULL, NULL, show);
}

void define_cache_settings(void)
{
    define("excimer.cache_size", "Bytes that relations' files may take on the local disk; 0: no bound.", SIZE, show_size);
    define("excimer.cache_used", "Bytes that they took when the bounded cache was last looked at.", USED, show_used);
    define("excimer.cache_reads", "Blocks read from relations' files, past shared buffers.", READS, show_reads);
    define("excimer.cache_misses", "Of those, blocks that had to be fetched.", MISSES, show_misses);
    define("excimer.cache_evicted", "Blocks evicted to keep to the size.", EVICTED, show_evicted);
    define("excimer.cache_hit_rate", "Part of the blocks read that was here.", NUMBERS, show_hit_rate);
}
