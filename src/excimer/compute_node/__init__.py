"""The compute node of a machine: starts, stops and watches endpoints there, as the controller orders.

It holds the managers' modules imported and warmed up, and forks a manager when an endpoint is to be awake, so
that neither Python's imports nor a command line are in the way of who waits for it. Managers are processes of
their own, which outlive it: a node that comes back adopts those that run.

Not here: what a manager does (`excimer.compute`), which endpoint is to be awake and where (`controller`), and
starting the node itself (`excimer.supervisor`).
"""
