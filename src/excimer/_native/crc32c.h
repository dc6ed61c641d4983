/* CRC-32C (Castagnoli), as PostgreSQL and Excimer's own files use it, callable without the GIL.
 *
 * The processor's instruction where there is one, else eight bytes at a time from tables.
 * crc32c(0, data, size) equals google_crc32c.value(data); pass a result on to continue it. */
#ifndef EXCIMER_CRC32C_H
#define EXCIMER_CRC32C_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

static uint32_t crc32c_tables[8][256];
static int crc32c_has_instruction;

static void crc32c_setup(void)
{
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t crc = i;
        for (int bit = 0; bit < 8; bit++)
            crc = crc & 1 ? (crc >> 1) ^ 0x82F63B78u : crc >> 1;
        crc32c_tables[0][i] = crc;
    }
    for (int t = 1; t < 8; t++)
        for (uint32_t i = 0; i < 256; i++)
            crc32c_tables[t][i] =
                (crc32c_tables[t - 1][i] >> 8) ^ crc32c_tables[0][crc32c_tables[t - 1][i] & 0xFF];
#if defined(__x86_64__)
    __builtin_cpu_init();
    crc32c_has_instruction = __builtin_cpu_supports("sse4.2") != 0;
#endif
}

static uint32_t crc32c_by_tables(uint32_t crc, const uint8_t *data, size_t size)
{
    for (; size >= 8; data += 8, size -= 8) {
        uint32_t low = crc ^ ((uint32_t)data[0] | (uint32_t)data[1] << 8 | (uint32_t)data[2] << 16 |
                              (uint32_t)data[3] << 24);
        crc = crc32c_tables[7][low & 0xFF] ^ crc32c_tables[6][low >> 8 & 0xFF] ^
              crc32c_tables[5][low >> 16 & 0xFF] ^ crc32c_tables[4][low >> 24] ^ crc32c_tables[3][data[4]] ^
              crc32c_tables[2][data[5]] ^ crc32c_tables[1][data[6]] ^ crc32c_tables[0][data[7]];
    }
    for (; size; data++, size--)
        crc = (crc >> 8) ^ crc32c_tables[0][(crc ^ *data) & 0xFF];
    return crc;
}

#if defined(__x86_64__)
__attribute__((target("sse4.2"))) static uint32_t crc32c_by_instruction(uint32_t crc, const uint8_t *data,
                                                                        size_t size)
{
    uint64_t wide = crc;
    for (; size >= 8; data += 8, size -= 8) {
        uint64_t word;
        memcpy(&word, data, 8);
        wide = __builtin_ia32_crc32di(wide, word);
    }
    crc = (uint32_t)wide;
    for (; size; data++, size--)
        crc = __builtin_ia32_crc32qi(crc, *data);
    return crc;
}
#elif defined(__aarch64__) && defined(__ARM_FEATURE_CRC32)
#include <arm_acle.h>
static uint32_t crc32c_by_instruction(uint32_t crc, const uint8_t *data, size_t size)
{
    for (; size >= 8; data += 8, size -= 8) {
        uint64_t word;
        memcpy(&word, data, 8);
        crc = __crc32cd(crc, word);
    }
    for (; size; data++, size--)
        crc = __crc32cb(crc, *data);
    return crc;
}
#endif

/* Continues `crc` (0 to begin) over `size` bytes. crc32c_setup() must have run in this module. */
static inline uint32_t crc32c(uint32_t crc, const uint8_t *data, size_t size)
{
#if defined(__x86_64__)
    if (crc32c_has_instruction)
        return ~crc32c_by_instruction(~crc, data, size);
#elif defined(__aarch64__) && defined(__ARM_FEATURE_CRC32)
    return ~crc32c_by_instruction(~crc, data, size);
#endif
    return ~crc32c_by_tables(~crc, data, size);
}

#endif
