"""Compares what a running endpoint has on its disk with what the pageserver serves at the same LSN.

A page of a relation says in its own header with which record it was last changed, so it can be compared while
the endpoint works: no moment has to be held still. What two good copies may differ in is PostgreSQL's to say
(`excimer.pgformat.page_masks`).

Not here: repairing anything; blocks that the endpoint has not fetched yet, for they are the pageserver's;
what WAL does not carry (free space maps, unlogged and temporary relations, statistics, slots).
"""
