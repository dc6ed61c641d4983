"""PostgreSQL's bytes as values: pages, WAL records, control file, checkpoints, SLRUs. No I/O.

Layouts hold for PostgreSQL 14 to 18 on little-endian 64-bit machines; where versions differ, the
function takes `pg_version` (the major number).
"""
