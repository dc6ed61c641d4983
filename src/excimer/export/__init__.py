"""Writes a branch, at one moment of its history, as a plain data directory or a tar of one.

What comes out is a cluster like any other: stock PostgreSQL of its version starts it, with nothing of
Excimer installed. It is read through the page service like a compute reads, a few requests ahead of
what is written, so memory is bounded whatever the branch's size.

Not here: which moments can be read (the controller and the pageserver decide), bringing a cluster in.
"""
