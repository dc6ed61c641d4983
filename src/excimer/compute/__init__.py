"""The compute manager: one stock PostgreSQL, started at an LSN on lazily hydrated files.

It wins the election at the safekeepers, fetches a basebackup from the pageserver, lays a data
directory that holds almost nothing, starts postgres on it with libhydrate preloaded, and streams
its WAL to the quorum. A directory that was shut down cleanly is used again while nobody else wrote; after any
crash it is thrown away, and the compute starts again.

Not here: which branch or LSN an endpoint shows (the controller's business), storage of anything
durable (a data directory may vanish at any moment, H2), and waking or routing (the proxy's).
"""
