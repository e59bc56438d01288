"""The client side of the WebSocket protocol `streamer.v1.json`, from low to high level: `rawjson`
(JSON values with their source text), `frames` (parsing), `follower` (one request, no
I/O), `session` (all requests of a client, no I/O), `connection` (connecting and reconnecting)."""
