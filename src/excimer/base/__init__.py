"""Values that every part shares: LSNs, ids, storage keys, error families, clock and chance.

Not here: anything that does I/O, and anything that only one part needs.
"""
