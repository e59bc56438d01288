//! Scans the queue, and starts due requests while capacity is available.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use streamer_core::{AttemptNumber, saturate};
use streamer_store::{DueQuery, StoreError};

use super::Dispatcher;

/// Maximum number of requests of one tenant read from the queue's index per page.
const PER_TENANT: usize = 256;
/// Maximum number of delayed requests that are released at once.
const MAX_RELEASED: usize = 256;
/// Maximum number of tenants read per page.
const TENANTS: usize = 256;

impl Dispatcher {
    /// Starts due requests while capacity is available.
    pub(super) async fn dispatch(self: &Arc<Self>) -> Result<(), StoreError> {
        self.release_delayed().await?;
        // Pairs of tenant and action without capacity. Later scans skip their requests, and find those behind them.
        let mut blocked = HashSet::new();
        while !self.is_stopping() && self.wakeup.take_pending_scan() {
            let freed = self.wakeup.freed_slots();
            let (actions, full) = self.startable_actions();
            if full {
                // The release of a slot triggers a new scan.
                self.wakeup.mark_scan_pending();
            }
            if actions.is_empty() {
                if self.wakeup.freed_slots() != freed {
                    continue;
                }
                break;
            }
            let blocked_before = blocked.len();
            let (started, remaining) = match self.start_due(&actions, full, &mut blocked).await {
                Ok(outcome) => outcome,
                Err(error) => {
                    self.wakeup.mark_scan_pending();
                    return Err(error);
                }
            };
            if remaining {
                self.wakeup.mark_scan_pending();
            }
            let may_find_more = blocked.len() > blocked_before && self.limiter.available() > 0;
            if started == 0 && !may_find_more && self.wakeup.freed_slots() == freed {
                break;
            }
            if self.wakeup.freed_slots() != freed {
                blocked.clear();
            }
        }
        Ok(())
    }

    /// Releases delayed requests that are due, and records when the next one becomes due. If more of them are due, that
    /// time has passed, and the dispatcher continues at once, but not before leases and other tenants had their turn.
    async fn release_delayed(&self) -> Result<(), StoreError> {
        let now = self.now();
        // Due times that are recorded from here on are compared with the store's below.
        let known = self.next_due.lock().take();
        if known.is_some_and(|due| due <= now) {
            self.wakeup.mark_scan_pending();
        }
        let outcome = self.store.release_delayed(now, MAX_RELEASED).await;
        let due = match &outcome {
            Ok(released) => {
                if released.count > 0 {
                    self.wakeup.mark_scan_pending();
                }
                released.next_due
            }
            Err(_) => known,
        };
        let mut next_due = self.next_due.lock();
        *next_due = [*next_due, due].into_iter().flatten().min();
        outcome.map(drop)
    }

    /// Returns the actions with capacity for an additional attempt, and whether an offered action has no capacity.
    fn startable_actions(&self) -> (Vec<String>, bool) {
        let mut full = false;
        let mut startable = Vec::new();
        let mut add = |name: &str, room: bool| {
            if room {
                startable.push(name.to_owned());
            }
            full |= !room;
        };
        for spec in self.actions.local() {
            let declared = self.actions.find(&spec.name, "");
            add(&spec.name, declared.is_some_and(|declared| self.limiter.has_capacity(&declared)));
        }
        let any = self.limiter.available() > 0;
        for (name, free) in self.actions.workers.offered_actions() {
            add(&name, free && any);
        }
        (startable, full)
    }

    /// Scans the queue once for `actions`; `full` means that actions without capacity are excluded. Returns the number
    /// of started requests, and whether more due requests may be queued.
    async fn start_due(
        self: &Arc<Self>,
        actions: &[String],
        full: bool,
        blocked: &mut HashSet<(String, String)>,
    ) -> Result<(usize, bool), StoreError> {
        // The page includes quarantined requests, so the limits are increased by their number.
        let quarantined = self.quarantine.count(self.now());
        let mut limits = self.limits();
        limits.values_mut().filter(|limit| **limit > 0).for_each(|limit| *limit += quarantined);
        let room = saturate::to_usize(self.limiter.available());
        let per_tenant = room.clamp(1, PER_TENANT) + quarantined;
        let after_tenant = self.after_tenant.lock().take();
        let is_first_page = after_tenant.is_none();
        let query = DueQuery {
            actions: actions.to_vec(),
            now: self.now(),
            after_tenant,
            tenants: TENANTS,
            per_tenant,
            limits: limits.clone(),
            blocked: blocked.clone(),
        };
        self.backlog.begin_scan();
        let page = self.store.due_requests(query).await?;
        let is_complete = page.next_tenant.is_none() && is_first_page;
        *self.after_tenant.lock() = page.next_tenant;
        // Tenants without capacity, or whose due requests reach the limit, may have more due requests.
        let mut counts: HashMap<String, usize> = HashMap::new();
        for request in &page.requests {
            *counts.entry(request.tenant.clone()).or_insert(0) += 1;
        }
        let limit = |tenant: &str| limits.get(tenant).map_or(per_tenant, |limit| *limit);
        let more = counts.iter().filter(|(tenant, count)| **count >= limit(tenant));
        let mut remaining: HashSet<String> = more.map(|(tenant, _)| tenant.clone()).collect();
        remaining.extend(blocked.iter().map(|(tenant, _)| tenant.clone()));
        remaining
            .extend(limits.iter().filter(|(_, limit)| **limit == 0).map(|(name, _)| name.clone()));
        let mut started = 0;
        for request in self.fair_queue.order(page.requests, &self.limiter.running_by_tenant()) {
            if quarantined > 0 && self.quarantine.contains(request.uid) {
                remaining.insert(request.tenant);
                continue;
            }
            let attempt = self.running.lock().get(&request.uid).map(|running| running.attempt);
            match attempt {
                None => {}
                // The index does not reflect the claim yet.
                Some(AttemptNumber::NONE) => continue,
                // The finished attempt is being removed; the next one may start after that.
                Some(_) => {
                    remaining.insert(request.tenant);
                    continue;
                }
            }
            match self.acquire_placement(&request.action, &request.tenant) {
                Some(placement) => {
                    self.fair_queue.charge(&request.tenant);
                    self.start(request.uid, &request.tenant, placement);
                    started += 1;
                }
                None => {
                    remaining.insert(request.tenant.clone());
                    blocked.insert((request.tenant, request.action));
                }
            }
        }
        let any_remaining = !is_complete || !remaining.is_empty();
        if is_complete && full {
            self.backlog.finish_partial_scan(remaining);
        } else if is_complete {
            self.backlog.finish_scan(remaining);
        } else {
            self.backlog.reset();
        }
        Ok((started, any_remaining))
    }

    /// Returns the maximum number of requests to read for each tenant with running attempts. The index still contains
    /// requests that are being claimed, so the limits include those.
    fn limits(&self) -> HashMap<String, usize> {
        let mut limits = self.limiter.available_by_tenant();
        let running = self.running.lock();
        for claiming in running.values().filter(|running| running.attempt == AttemptNumber::NONE) {
            if let Some(limit) = limits.get_mut(&claiming.tenant).filter(|limit| **limit > 0) {
                *limit += 1;
            }
        }
        limits.values_mut().for_each(|limit| *limit = (*limit).min(PER_TENANT));
        limits
    }
}
