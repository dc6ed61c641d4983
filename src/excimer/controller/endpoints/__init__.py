"""Bytes to operations and back: the controller's HTTP API. The only place here for untyped data."""
