//! Reads the queue, and starts the requests that the scheduler selects while capacity is available.

use std::{sync::Arc, time::Duration};

use streamer_core::{AttemptNumber, saturate};
use streamer_store::{DueRequest, StoreError};

use super::{Dispatcher, Placement};
use crate::scheduler::{Capacity, Slot};

/// Maximum number of delayed requests that are released at once.
const MAX_RELEASED: usize = 256;

/// Time after a release at which the queue is scanned again, if the store is shared.
const RESCAN_DELAY: Duration = Duration::from_millis(200);

impl Dispatcher {
    /// Starts due requests while capacity is available.
    pub(super) async fn dispatch(self: &Arc<Self>) -> Result<(), StoreError> {
        if let Err(error) = self.release_delayed().await {
            tracing::warn!(%error, "failed to release delayed requests");
        }
        self.scheduler.lock().on_slots_freed();
        while !self.is_stopping() && self.wakeup.take_pending_scan() {
            let freed = self.wakeup.freed_slots();
            let capacity = self.capacity();
            if capacity.is_partial {
                // The release of a slot triggers a new scan.
                self.wakeup.mark_scan_pending();
            }
            if capacity.actions.is_empty() {
                if self.wakeup.freed_slots() != freed {
                    continue;
                }
                break;
            }
            let may_continue = match self.start_due(capacity).await {
                Ok(may_continue) => may_continue,
                Err(error) => {
                    self.wakeup.mark_scan_pending();
                    return Err(error);
                }
            };
            if self.wakeup.freed_slots() != freed {
                self.scheduler.lock().on_slots_freed();
            } else if !may_continue {
                break;
            }
        }
        Ok(())
    }

    /// Releases delayed requests that are due, and records when the next one becomes due. If more of them are due, that
    /// time has passed, and the dispatcher continues at once, but not before leases and other tenants had their turn.
    async fn release_delayed(&self) -> Result<(), StoreError> {
        let now = self.now();
        let known = self.scheduler.lock().begin_release();
        if known.is_some_and(|due| due <= now) {
            self.wakeup.mark_scan_pending();
        }
        let outcome = self.store.release_delayed(now, MAX_RELEASED).await;
        let due = match &outcome {
            Ok(released) => {
                if released.count > 0 {
                    self.wakeup.mark_scan_pending();
                }
                // The index may contain the released requests only some time later.
                let again = released.count > 0 && self.options.shared;
                let again = again.then(|| now.plus(RESCAN_DELAY));
                [released.next_due, again].into_iter().flatten().min()
            }
            Err(_) => known,
        };
        self.scheduler.lock().end_release(due);
        outcome.map(drop)
    }

    /// Returns the capacity for additional attempts.
    fn capacity(&self) -> Capacity {
        let total = self.limiter.available();
        let mut capacity = Capacity { total: saturate::to_usize(total), ..Capacity::default() };
        let mut add = |name: &str, has_slot: bool| {
            if has_slot {
                capacity.actions.push(name.to_owned());
            }
            capacity.is_partial |= !has_slot;
        };
        for spec in self.actions.local() {
            let declared = self.actions.find(&spec.name, "");
            add(&spec.name, declared.is_some_and(|declared| self.limiter.has_capacity(&declared)));
        }
        for (name, has_slot) in self.actions.workers.offered_actions() {
            add(&name, has_slot && total > 0);
        }
        capacity.by_tenant = self.limiter.available_by_tenant();
        // The index still contains requests that are being claimed.
        self.running.add_claiming(&mut capacity.by_tenant);
        capacity
    }

    /// Reads a page of the queue and starts its requests. Returns whether the next page may contain requests that can
    /// start.
    async fn start_due(self: &Arc<Self>, capacity: Capacity) -> Result<bool, StoreError> {
        let query = self.scheduler.lock().next_query(capacity, self.now());
        let page = self.store.due_requests(query).await?;
        let (load, now) = (self.running.load(), self.now());
        let plan = self.scheduler.lock().plan(page, &load, now, |request| self.find_slot(request));
        if plan.has_more {
            self.wakeup.mark_scan_pending();
        }
        let may_continue =
            !plan.starts.is_empty() || (plan.has_blocked && self.limiter.available() > 0);
        for (request, placement) in plan.starts {
            self.start(request.uid, &request.tenant, &request.user, placement);
        }
        Ok(may_continue)
    }

    fn find_slot(&self, request: &DueRequest) -> Slot<Placement> {
        match self.running.number(request.uid) {
            Some(AttemptNumber::NONE) => Slot::Claiming,
            Some(_) => Slot::Ending,
            None => match self.acquire_placement(&request.action, &request.tenant) {
                Some(placement) => Slot::Free(placement),
                None => Slot::None,
            },
        }
    }
}
