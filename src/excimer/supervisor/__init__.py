"""The supervisor of a local installation: services are forked from it, and come back when they die.

It imports once what services share and stands still; a service is a fork of it, so that all of them use the
same memory for Python and its libraries, and start without importing anything. It watches them: one that
dies is started again, later and later.

Not here: what a service does, when one is to be started or stopped (`cli`), and endpoints, whose managers the
compute node forks.
"""
