"""The pageserver: turns committed WAL into pages at any retained LSN, and serves them.

It owns tenants and their timelines on one machine: takes WAL from safekeepers, hands it as keyed values
to the page store, answers computes (pages, basebackups) and operators (an HTTP API).

Not here: the store itself (`excimer.storage`), deciding which pageserver has which tenant (the
controller), and durability of recent WAL (the safekeepers).
"""
