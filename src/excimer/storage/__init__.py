"""The layered page store: a library that the pageserver hosts.

`format` holds bytes of layers and manifests, `plan` decisions, `engine` what carries them out.
Not here: PostgreSQL's WAL (pageserver's ingest turns it into keyed values) and any network.
"""
