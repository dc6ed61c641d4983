"""Where bytes become requests and results become bytes: the page service, the HTTP API, the error table."""
