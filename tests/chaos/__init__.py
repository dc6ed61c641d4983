"""Random faults under load, with a checker that stands outside: `python -m tests.chaos`, or `make chaos`.

    clients --SQL--> target (Excimer, or stock PostgreSQL with a synchronous standby)
       |                ^
       | history        | kills, stalls, cut and dead connections, full disks (faults)
       v                |
    list_append, bank   run: one fault after another, then rest, then the verdict

Every transaction of every client is on disk before the next begins, so that a run that fails, hangs or is
killed leaves its history.
"""
