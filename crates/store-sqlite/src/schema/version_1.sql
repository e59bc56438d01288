-- Tables of schema version 1, as commit b616030 created them, with three requests: one that is due, one that has ended,
-- and one that is delayed.
CREATE TABLE requests (
    uid BLOB PRIMARY KEY,
    client_id TEXT,
    tenant TEXT NOT NULL,
    user TEXT NOT NULL,
    action TEXT NOT NULL,
    state INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    last_seq INTEGER NOT NULL,
    attempt_seq INTEGER NOT NULL,
    priority INTEGER NOT NULL,
    create_time INTEGER NOT NULL,
    start_time INTEGER,
    finish_time INTEGER,
    not_before INTEGER NOT NULL,
    deadline INTEGER,
    lease_until INTEGER,
    lease_holder TEXT,
    progress BLOB,
    metadata BLOB,
    cancel_reason TEXT,
    error BLOB,
    output_chunks INTEGER,
    output_sha256 BLOB,
    redrive_of BLOB,
    trace_parent TEXT,
    fingerprint BLOB NOT NULL
) WITHOUT ROWID;
CREATE UNIQUE INDEX requests_by_client_id ON requests (tenant, user, client_id)
    WHERE client_id IS NOT NULL;
CREATE INDEX requests_by_owner ON requests (tenant, user, uid);
CREATE INDEX requests_by_tenant ON requests (tenant, uid);
CREATE INDEX requests_queued ON requests (action, priority, not_before, uid) WHERE state = 0;
CREATE INDEX requests_waiting ON requests (not_before) WHERE state = 0;
CREATE INDEX requests_leased ON requests (lease_until) WHERE state = 1;

CREATE TABLE payloads (
    uid BLOB PRIMARY KEY,
    content_type TEXT NOT NULL,
    data BLOB NOT NULL
) WITHOUT ROWID;

CREATE TABLE checkpoints (
    uid BLOB PRIMARY KEY,
    data BLOB NOT NULL
) WITHOUT ROWID;

CREATE TABLE events (
    uid BLOB NOT NULL,
    last_seq INTEGER NOT NULL,
    batch BLOB NOT NULL,
    PRIMARY KEY (uid, last_seq)
) WITHOUT ROWID;

CREATE TABLE connections (
    id BLOB PRIMARY KEY,
    tenant TEXT NOT NULL,
    user TEXT NOT NULL,
    gateway TEXT NOT NULL,
    remote_address TEXT NOT NULL,
    user_agent TEXT NOT NULL,
    connect_time INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX connections_by_tenant ON connections (tenant, id);

CREATE TABLE gateways (
    gateway TEXT PRIMARY KEY,
    alive_until INTEGER NOT NULL
) WITHOUT ROWID;

CREATE TABLE health (only_row INTEGER PRIMARY KEY CHECK (only_row = 1), checks INTEGER NOT NULL);
INSERT INTO health VALUES (1, 0);

INSERT INTO requests (uid, tenant, user, action, state, attempt, last_seq, attempt_seq, priority, create_time,
    not_before, deadline, metadata, fingerprint)
VALUES (x'00000000000000000000000000000000', 't', 'u', 'a', 0, 0, 2, 0, 0, 1, 1, 9, x'0102', x'00'),
    (x'01000000000000000000000000000000', 't', 'v', 'a', 2, 1, 1, 0, 0, 1, 1, NULL, NULL, x'00'),
    (x'02000000000000000000000000000000', 't', 'u', 'a', 0, 0, 1, 0, 0, 1, 9999999999999, NULL, NULL, x'00');
INSERT INTO payloads VALUES (x'00000000000000000000000000000000', '', x'010203');
INSERT INTO events VALUES (x'00000000000000000000000000000000', 1, x'7800'), (x'00000000000000000000000000000000', 2, x'78007800'),
    (x'01000000000000000000000000000000', 1, x'780078007800');
PRAGMA user_version = 1;
