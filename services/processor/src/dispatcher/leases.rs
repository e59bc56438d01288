//! Renews the leases of running attempts, and recovers attempts whose leases expired.

use std::sync::Arc;

use streamer_core::{RetryPolicy, Timestamp};
use streamer_proto::common::v1::event::Kind;
use streamer_store::{Append, AppendOutcome, RequestRecord, Writer, log_event};
use streamer_telemetry::IndexedActionLabel;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use super::Dispatcher;
use crate::attempt::{
    log_lines::{attempt_span, log_end},
    outcome, recovery,
};

/// Maximum number of requests read from an index per page.
const PAGE: usize = 256;

impl Dispatcher {
    /// Fails a queued request whose deadline or schedule-to-close timeout has passed.
    pub(super) async fn fail_unstarted(&self, record: &RequestRecord) {
        let kind = outcome::overdue(record, self.now());
        let declared = self.actions.find(&record.action, &record.owner.tenant);
        let label = self.metrics.label(declared.as_deref());
        let writer = Writer::Queued(record.attempt);
        self.append_final_event(record, writer, kind, None, &label).await;
    }

    /// Appends and announces the final event of an attempt that no processor runs, or of a queued request.
    async fn append_final_event(
        &self,
        record: &RequestRecord,
        writer: Writer,
        kind: Kind,
        retry_at: Option<Timestamp>,
        label: &IndexedActionLabel,
    ) {
        let now = self.now();
        let event = log_event(record.last_seq.next(), record.attempt, now, kind.clone());
        let append = Append {
            uid: record.uid,
            writer,
            events: vec![event.clone()],
            checkpoint: None,
            retry_at,
            now,
        };
        match self.store.append(append).await {
            Ok(AppendOutcome::Applied { .. }) => {
                match writer {
                    Writer::Queued(_) => self.metrics.queued_request_ended(label, &kind),
                    Writer::Attempt(_) | Writer::ExpiredLease(_) => {
                        self.metrics.attempt_ended(label, &kind);
                    }
                }
                attempt_span(record).in_scope(|| log_end(&kind, None));
                self.environment.log.announce(record.uid, vec![event]).await;
                if let Some(retry_at) = retry_at {
                    self.record_due(retry_at);
                }
            }
            // Another processor has already finished the attempt.
            Ok(_) => {}
            Err(error) => {
                tracing::warn!(%error, uid = %record.uid, "failed to finish an attempt, will retry");
            }
        }
    }

    /// Fails overdue requests, including those that this processor cannot run.
    pub(super) async fn fail_overdue(&self) {
        match self.store.overdue_requests(self.now(), PAGE).await {
            Ok(overdue) => {
                for record in overdue {
                    self.fail_unstarted(&record).await;
                }
            }
            Err(error) => tracing::warn!(%error, "failed to read overdue requests"),
        }
    }

    /// Finishes attempts whose leases expired.
    pub(super) async fn recover_expired_leases(&self) {
        let expired = match self.store.expired_leases(self.now(), PAGE).await {
            Ok(expired) => expired,
            Err(error) => {
                tracing::warn!(%error, "failed to read expired leases");
                return;
            }
        };
        for record in expired {
            if self.is_stopping() {
                return;
            }
            let mut declared = self.actions.find(&record.action, &record.owner.tenant);
            if declared.is_none() && self.options.shared {
                // The action may have been declared to another processor in the meantime.
                if let Err(error) = self.actions.load(&*self.store, &*self.environment.clock).await
                {
                    tracing::warn!(%error, "failed to load the declared actions");
                    return;
                }
                declared = self.actions.find(&record.action, &record.owner.tenant);
            }
            let label = self.metrics.label(declared.as_deref());
            let policy = declared.map_or_else(RetryPolicy::default, |declared| declared.spec.retry);
            match recovery::final_event(&*self.store, &record, policy, self.now()).await {
                Ok(event) => {
                    self.metrics.lease_expiries.inc();
                    attempt_span(&record).in_scope(|| {
                        tracing::info!("recovering an attempt: its lease expired");
                    });
                    let writer = Writer::ExpiredLease(record.attempt);
                    let (kind, retry_at) = (event.kind, event.retry_at);
                    self.append_final_event(&record, writer, kind, retry_at, &label).await;
                }
                Err(error) => {
                    tracing::warn!(%error, uid = %record.uid, "failed to recover an attempt");
                }
            }
        }
    }

    /// Renews the leases of all running attempts, with one timer, until `stop` is cancelled.
    pub(super) async fn renew_leases_until(self: Arc<Self>, stop: CancellationToken) {
        let mut ticks = interval(self.options.lease / 3);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                _ = ticks.tick() => {}
            }
            let leases = self.running.leases();
            if leases.is_empty() {
                continue;
            }
            let now = self.now();
            let until = now.plus(self.options.lease);
            match self.store.renew_leases(self.name.clone(), leases, until, now).await {
                Ok(renewed) => renewed.iter().for_each(|one| self.running.apply_renewal(one)),
                Err(error) => tracing::warn!(%error, "failed to renew leases"),
            }
        }
    }
}
