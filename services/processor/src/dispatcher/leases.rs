//! Leases: keeping those of what runs here, and ending what others left or nobody took.

use std::sync::Arc;

use streamer_core::{RetryPolicy, Timestamp};
use streamer_proto::common::v1::event::Kind;
use streamer_store::{Append, Appended, Lease, Renewed, RequestRecord, Writer};
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use super::Dispatcher;
use crate::{outcome, takeover};

/// Requests taken from an index at a time.
const PAGE: usize = 256;

impl Dispatcher {
    /// Ends a request that has waited for too long.
    pub(super) async fn fail_unrun(&self, record: &RequestRecord) {
        let kind = outcome::overdue(record, self.now());
        self.conclude(record, Writer::Queued(record.attempt), kind, None).await;
    }

    /// Appends the last event of an attempt that nobody runs, and delivers it.
    async fn conclude(
        &self,
        record: &RequestRecord,
        writer: Writer,
        kind: Kind,
        retry_at: Option<Timestamp>,
    ) {
        let now = self.now();
        let event = outcome::event(record.last_seq + 1, record.attempt, now, kind.clone());
        let append = Append {
            uid: record.uid,
            writer,
            events: vec![event.clone()],
            checkpoint: None,
            retry_at,
            now,
        };
        match self.store.append(append).await {
            Ok(Appended::Applied { .. }) => {
                self.count(&kind);
                self.environment.log.announce(record.uid, vec![event]).await;
                if let Some(retry_at) = retry_at {
                    self.note_due(retry_at);
                }
            }
            // Somebody else was first.
            Ok(_) => {}
            Err(error) => {
                tracing::warn!(%error, uid = %record.uid, "could not end an attempt; it will be found again");
            }
        }
    }

    /// Ends requests that have waited for too long, also those that nobody here could run.
    pub(super) async fn fail_overdue(&self) {
        match self.store.overdue_requests(self.now(), PAGE).await {
            Ok(overdue) => {
                for record in overdue {
                    self.fail_unrun(&record).await;
                }
            }
            Err(error) => tracing::warn!(%error, "could not look for overdue requests"),
        }
    }

    /// Ends attempts whose holder is gone.
    pub(super) async fn take_over_expired(&self) {
        let expired = match self.store.expired_leases(self.now(), PAGE).await {
            Ok(expired) => expired,
            Err(error) => {
                tracing::warn!(%error, "could not look for expired leases");
                return;
            }
        };
        for record in expired {
            if self.is_stopping() {
                return;
            }
            let mut declared = self.actions.find(&record.action, &record.owner.tenant);
            if declared.is_none() && self.options.shared {
                // It may have been declared to another processor since.
                if let Err(error) = self.actions.load(&*self.store, &*self.environment.clock).await
                {
                    tracing::warn!(%error, "could not read the declared actions");
                    return;
                }
                declared = self.actions.find(&record.action, &record.owner.tenant);
            }
            let policy = declared.map_or_else(RetryPolicy::default, |declared| declared.spec.retry);
            match takeover::conclude(&*self.store, &record, policy, self.now()).await {
                Ok(ending) => {
                    self.metrics.lease_expiries.inc();
                    let writer = Writer::ExpiredLease(record.attempt);
                    self.conclude(&record, writer, ending.kind, ending.retry_at).await;
                }
                Err(error) => {
                    tracing::warn!(%error, uid = %record.uid, "could not take over an attempt");
                }
            }
        }
    }

    /// Prolongs the leases of everything that runs here, one timer for all.
    pub(super) async fn keep_leases(self: Arc<Self>, stop: CancellationToken) {
        let mut ticks = interval(self.options.lease / 3);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                _ = ticks.tick() => {}
            }
            let leases: Vec<Lease> = {
                let running = self.running.lock();
                let claimed = running.iter().filter(|(_, running)| running.attempt > 0);
                claimed
                    .map(|(uid, running)| Lease { uid: *uid, attempt: running.attempt })
                    .collect()
            };
            if leases.is_empty() {
                continue;
            }
            let now = self.now();
            let until = now.plus(self.options.lease);
            match self.store.renew_leases(self.name.clone(), leases, until, now).await {
                Ok(renewed) => renewed.into_iter().for_each(|renewed| self.note_renewal(&renewed)),
                Err(error) => tracing::warn!(%error, "could not renew leases"),
            }
        }
    }

    fn note_renewal(&self, renewed: &Renewed) {
        let running = self.running.lock();
        let Some(running) = running.get(&renewed.lease.uid) else { return };
        if running.attempt != renewed.lease.attempt {
            return;
        }
        if let Some(reason) = &renewed.cancel_reason {
            running.handle.cancel(reason);
        }
        if !renewed.held {
            running.handle.note_lease_missing();
        }
    }
}
