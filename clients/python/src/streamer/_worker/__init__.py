"""The worker side of docs/worker-protocol.md, from low to high level: `report_queue` (the reports
of one attempt, no I/O), `attempt` (one handler and its reports), `registry` (all attempts, no I/O),
`stream` (one stream), `connection` (connecting and reconnecting)."""
