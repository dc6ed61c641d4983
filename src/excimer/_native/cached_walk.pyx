"""A read's walk through layers on disk as far as cached blocks carry it: no file, no lock, no other thread.

It does what `storage/engine/page_reads.collect_chains` does with blocks that it reads; a property test says
that both find the same. For a handful of pages only: the GIL is held throughout, so that the event loop,
whose thread this runs in, need not wait to have it back.

Not here: which layers are visited (`storage/plan/read_path`, remembered by `storage/engine/walk_memory`).
"""

from cpython.object cimport PyObject
from libc.string cimport memcmp, memcpy

from excimer._native.block_cache cimport BlockCache
from excimer._native.block_index cimport BlockIndex
from excimer._native.page_chains cimport PageChains

cdef enum:
    KEY_SIZE = 18
    ENTRY_SIZE = 72

cdef extern from *:
    """
    #include <stdint.h>
    static inline void key_of_block(unsigned char *key, uint32_t block) {
        key[14] = (unsigned char)(block >> 24); key[15] = (unsigned char)(block >> 16);
        key[16] = (unsigned char)(block >> 8); key[17] = (unsigned char)block;
    }
    """
    void key_of_block(unsigned char* key, unsigned int block)


def collect_cached(PageChains chains, list steps, BlockCache cache, int values_max, tick) -> bool:
    """Offers the values of the steps (layer, low LSN, high LSN), in order, until every chain is closed.

    A layer has a `number` and an `index`, None as long as it is not open; its `last_used` becomes `tick`.
    False: a layer is not open, or a block is not in the cache, or the chains have more than `values_max`
    values; they are then of no further use. Raises `MalformedValueError`.
    """
    cdef unsigned char last_key[KEY_SIZE]
    cdef BlockIndex index
    cdef unsigned long long low_lsn, high_lsn
    cdef unsigned int layer_number
    cdef int number
    cdef PyObject* block
    cdef tuple step
    memcpy(last_key, chains.first_key, KEY_SIZE)
    key_of_block(last_key, chains.first_block + <unsigned int> chains.count - 1)
    for step in steps:
        layer = step[0]
        index = layer.index
        if index is None:
            return False
        layer.last_used = tick
        layer_number, low_lsn, high_lsn = layer.number, step[1], step[2]
        for number in range(index.first_at_or_above(chains.first_key), index.count):
            if memcmp(index.entries + <Py_ssize_t> number * ENTRY_SIZE, last_key, KEY_SIZE) > 0:
                break
            if index.offers(number, low_lsn, high_lsn):
                block = cache.find(layer_number, <unsigned int> number)
                if block is NULL:
                    return False
                chains.add_block(<bytes> <object> block, low_lsn, high_lsn)
                if chains.link_count > values_max:
                    return False
        if chains.open_count == 0:
            return True
    return True
