"""The kit that every Excimer process stands on: settings, tasks, logs, metrics, health, HTTP, start and stop.

Light processes (the compute manager, the CLI) import `settings`, `tasks`, `logs`, `log_files`, `health`,
`accept`, `connections`, `light_http`, `plain_metrics`, `http_client`, `instance_lock`, `listen` and
`process_main`, which pull in nothing heavier than asyncio, msgspec and h11. Only `http` (FastAPI),
`metrics` (prometheus-client) and `broker_client` (nats-py) cost more.

Not here: anything that knows what a service does.
"""
