"""PostgreSQL's own suites against an endpoint, and `excimer verify` after each: `make regress PG=18`.

sources.py    the suites: PostgreSQL's source of the same minor version, from Debian or unpacked by you
suites.py     which suites there are, how one is run, and which differences from stock are known
places.py     the servers: an endpoint of an installation of its own, or stock PostgreSQL
__main__.py   an installation, the suites, verify, one line for each test that differs
"""
