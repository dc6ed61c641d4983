"""The safekeeper: keeps a timeline's newest WAL durable, one replica of a quorum.

It accepts WAL from the elected proposer of each timeline, syncs it to disk before it says so, and
serves what is committed to whoever reads PostgreSQL's replication protocol.

Not here: quorum commit itself (`consensus`, pure), pages (the pageserver's business), object
storage (WAL is simply kept on local disk).
"""
