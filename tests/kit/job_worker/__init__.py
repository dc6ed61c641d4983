"""A preloaded library whose background worker waits for jobs, as pg_cron's does (`job_worker.c`)."""

from pathlib import Path
from typing import Final

from excimer.postgres import PostgresBuild
from excimer.postgres.redo_extension import cached_module

WORKER: Final = "job worker"
"""Its backend_type."""
JOB: Final = "job"
"""A file in the data directory: while it is there the worker is in a transaction."""


def job_worker(build: PostgresBuild) -> Path:
    """The compiled library. Blocks some seconds the first time."""
    return cached_module(build, "job-worker", Path(__file__).parent, "job_worker.so")
