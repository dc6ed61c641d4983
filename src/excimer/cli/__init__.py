"""The command line: the same operations as the services' APIs, and local processes.

It is a client. What exists is the controller's business; the CLI owns only the state directory of
a local installation (`.excimer/`): its configuration, keys, ports, and which processes run.

Each command group is a module of `commands`, imported when it is used, so that help is instant.

Not here: anything that a service should decide.
"""
