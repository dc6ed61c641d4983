"""`make bench`: Excimer against plain PostgreSQL on the same machine, side by side and interleaved.

Each family (`warm_reads`, `commits`, `ingest`, `cold_scan`, `branching`, `starting`) says in its docstring
what is compared with what. Each figure is the median of at least five rounds, each round measures the
peers one after the other, and every second round in the other order, so that what else the machine does
meets both. `python -m bench --only ID` measures one figure's family, `--quick` checks that the
benchmark works: its figures mean little.

Not here: what the figures were and why (docs/performance.md); tests (nothing here fails for being slow).
"""
