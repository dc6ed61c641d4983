"""`make bench`: Excimer against plain PostgreSQL on the same machine, side by side and interleaved."""
