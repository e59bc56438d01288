"""The worker's side of docs/worker-protocol.md, from the inside out: `reports` (what one attempt
has to say), `attempt` (one handler and its reports), `core` (all attempts, no I/O), `conversation`
(one stream), `link` (one stream after another)."""
