//! Helpers for the unit tests of several modules.

use std::time::Duration;

use streamer_core::{Timestamp, Uid};
use streamer_store::{Claim, ClaimOutcome, NewRequest, Owner, Quota, Store, StoredPayload};

const LEASE: Duration = Duration::from_secs(60);

/// Stores a request whose first attempt is running; its log contains events 1 and 2.
pub(crate) async fn running_request(store: &dyn Store, uid: Uid, now: Timestamp) {
    let new = NewRequest {
        uid,
        client_id: None,
        owner: Owner { tenant: "acme".into(), user: "ann".into() },
        fingerprint: [0; 32],
        quota: Quota::default(),
        action: "a".into(),
        payload: StoredPayload { content_type: String::new(), data: "1".into() },
        metadata: None,
        priority: 0,
        create_time: now,
        not_before: now,
        deadline: None,
        close_by: None,
        redrive_of: None,
        trace_parent: None,
        trace_state: None,
    };
    store.create_request(new).await.unwrap();
    let claim = Claim {
        uid,
        holder: "p".into(),
        worker: None,
        now,
        lease_until: now.plus(LEASE),
        repeats: None,
    };
    assert!(matches!(store.claim(claim).await.unwrap(), ClaimOutcome::Claimed(_)));
}
