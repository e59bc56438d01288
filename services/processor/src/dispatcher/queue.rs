//! Looking at the queue: what is due, and whom there is room for.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use streamer_store::{DueQuery, StoreError};

use super::Dispatcher;

/// Requests of one tenant taken from the queue's index at a time.
const PER_TENANT: usize = 256;
/// Tenants whose queues are looked at at a time.
const TENANTS: usize = 256;

impl Dispatcher {
    /// Starts what is due while there is room.
    pub(super) async fn dispatch(self: &Arc<Self>) -> Result<(), StoreError> {
        let mut looked_at = self.now();
        // What is noted from here on is compared with what the store says at the end.
        if self.next_due.lock().take().is_some_and(|due| due <= looked_at) {
            self.signal.note_backlog();
        }
        // What could not be started does not hide what is queued behind it.
        let mut blocked = HashSet::new();
        while !self.is_stopping() && self.signal.take_backlog() {
            let freed = self.signal.freed();
            let (actions, full) = self.with_room();
            if full {
                // A slot that is given back looks again.
                self.signal.note_backlog();
            }
            if actions.is_empty() {
                if self.signal.freed() != freed {
                    continue;
                }
                break;
            }
            looked_at = self.now();
            let known = blocked.len();
            let (started, left) = match self.start_due(&actions, full, &mut blocked).await {
                Ok(outcome) => outcome,
                Err(error) => {
                    self.signal.note_backlog();
                    return Err(error);
                }
            };
            if left {
                self.signal.note_backlog();
            }
            let may_find_more = blocked.len() > known && self.slots.free() > 0;
            if started == 0 && !may_find_more && self.signal.freed() == freed {
                break;
            }
            if self.signal.freed() != freed {
                blocked.clear();
            }
        }
        // What has become due since then was not seen.
        let due = self.store.next_due(looked_at).await?;
        let mut noted = self.next_due.lock();
        *noted = [*noted, due].into_iter().flatten().min();
        Ok(())
    }

    /// The names of everything that one more may run of, and whether something is offered that
    /// nobody has room for at present.
    fn with_room(&self) -> (Vec<String>, bool) {
        let mut full = false;
        let mut open = Vec::new();
        let mut note = |name: &str, room: bool| {
            if room {
                open.push(name.to_owned());
            }
            full |= !room;
        };
        for spec in self.actions.local() {
            let declared = self.actions.find(&spec.name, "");
            note(&spec.name, declared.is_some_and(|declared| self.slots.has_room(&declared)));
        }
        let any = self.slots.free() > 0;
        for (name, free) in self.actions.workers.names() {
            note(&name, free && any);
        }
        (open, full)
    }

    /// Looks at the queue once, for these actions, which are not all if others are `full`; says how many
    /// were started, and whether more may be waiting.
    async fn start_due(
        self: &Arc<Self>,
        actions: &[String],
        full: bool,
        blocked: &mut HashSet<(String, String)>,
    ) -> Result<(usize, bool), StoreError> {
        // What is set aside comes with the rest, and takes nobody's place.
        let set_aside = self.set_aside.count(self.now());
        let mut limits = self.limits();
        limits.values_mut().filter(|limit| **limit > 0).for_each(|limit| *limit += set_aside);
        let room = usize::try_from(self.slots.free()).unwrap_or(usize::MAX);
        let per_tenant = room.clamp(1, PER_TENANT) + set_aside;
        let after_tenant = self.after_tenant.lock().take();
        let from_the_first = after_tenant.is_none();
        let query = DueQuery {
            actions: actions.to_vec(),
            now: self.now(),
            after_tenant,
            tenants: TENANTS,
            per_tenant,
            limits: limits.clone(),
            blocked: blocked.clone(),
        };
        self.waiting.look();
        let page = self.store.due_requests(query).await?;
        let whole = page.next_tenant.is_none() && from_the_first;
        *self.after_tenant.lock() = page.next_tenant;
        // Whoever has no room, or more due than was asked for, has something left.
        let mut counts: HashMap<String, usize> = HashMap::new();
        for request in &page.requests {
            *counts.entry(request.tenant.clone()).or_insert(0) += 1;
        }
        let limit = |tenant: &str| limits.get(tenant).map_or(per_tenant, |limit| *limit);
        let more = counts.iter().filter(|(tenant, count)| **count >= limit(tenant));
        let mut left: HashSet<String> = more.map(|(tenant, _)| tenant.clone()).collect();
        left.extend(blocked.iter().map(|(tenant, _)| tenant.clone()));
        left.extend(limits.iter().filter(|(_, limit)| **limit == 0).map(|(name, _)| name.clone()));
        let mut started = 0;
        for request in self.turns.order(page.requests, &self.slots.by_tenant()) {
            if set_aside > 0 && self.set_aside.contains(request.uid) {
                left.insert(request.tenant);
                continue;
            }
            let attempt = self.running.lock().get(&request.uid).map(|running| running.attempt);
            match attempt {
                None => {}
                // The index does not show yet that it is claimed.
                Some(0) => continue,
                // An attempt has ended and is about to leave; then the next one may start.
                Some(_) => {
                    left.insert(request.tenant);
                    continue;
                }
            }
            match self.place(&request.action, &request.tenant) {
                Some(place) => {
                    self.turns.took(&request.tenant);
                    self.start(request.uid, &request.tenant, place);
                    started += 1;
                }
                None => {
                    left.insert(request.tenant.clone());
                    blocked.insert((request.tenant, request.action));
                }
            }
        }
        let any_left = !whole || !left.is_empty();
        if whole && full {
            self.waiting.were_left_too(left);
        } else if whole {
            self.waiting.were_left(left);
        } else {
            self.waiting.forget();
        }
        Ok((started, any_left))
    }

    /// How many are wanted of each tenant that has something running. The index still shows what is
    /// being claimed, so that as many more are asked for.
    fn limits(&self) -> HashMap<String, usize> {
        let mut limits = self.slots.tenant_room();
        let running = self.running.lock();
        for claiming in running.values().filter(|running| running.attempt == 0) {
            if let Some(limit) = limits.get_mut(&claiming.tenant).filter(|limit| **limit > 0) {
                *limit += 1;
            }
        }
        limits.values_mut().for_each(|limit| *limit = (*limit).min(PER_TENANT));
        limits
    }
}
