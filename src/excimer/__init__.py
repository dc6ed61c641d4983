"""Excimer: serverless Postgres on stock PostgreSQL, with storage apart from compute."""

__version__ = "0.1.0"
