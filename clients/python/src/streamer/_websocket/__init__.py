"""The WebSocket protocol `streamer.v1.json`, from the inside out: `rawjson` (values and the very
text they stand for), `frames` (what the server says), `follow` (one request, no I/O), `session`
(the connection, and all requests that are followed over it)."""
