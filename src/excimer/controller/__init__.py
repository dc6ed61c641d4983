"""The controller: who exists and where. It owns the metadata database and nothing else.

It keeps tenants, timelines (branches) and their names, endpoints and their ports, pageservers,
safekeepers, generations; creates and deletes by calling pageservers and safekeepers; and gives a
compute manager everything that it needs to start. Its HTTP API is the only way to all of it.

Not here: any data of users, running computes (the CLI, later an orchestrator), and durability of
anything but its own database.
"""
