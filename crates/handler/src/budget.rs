//! Budget for the bytes that the attempts or watchers of a process keep in memory, divided fairly between tenants or
//! users.

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    fmt,
    sync::Arc,
};

use parking_lot::Mutex;
use tokio::sync::oneshot;

/// Memory budget in bytes that many attempts share.
///
/// A tenant may reserve bytes while its total does not exceed the bytes that it leaves free for the others: a single
/// busy tenant gets about half of the budget, each of n busy tenants about 1/(n + 1) of it. A tenant that starts later
/// therefore finds free capacity (dynamic thresholds: A. Choudhury and E. Hahne, "Dynamic Queue Length Thresholds for
/// Shared-Memory Packet Switches", 1998). A tenant without reservations may reserve all free bytes. Among waiting
/// tenants, the tenant with the fewest reserved bytes is served first and, among equals, the tenant that has waited the
/// longest. The waiters of one tenant are served in the order of their arrival.
pub struct MemoryBudget {
    limit: usize,
    state: Mutex<State>,
}

/// Callback that receives the number of reserved bytes whenever it changes.
type Observer = Box<dyn Fn(usize) + Send + Sync>;

#[derive(Default)]
struct State {
    used: usize,
    observer: Option<Observer>,
    tenants: HashMap<Arc<str>, Tenant>,
    /// Tenants with waiters, ordered by [`Tenant::rank`].
    waiting: BTreeSet<(Rank, Arc<str>)>,
    /// Number of the next waiter.
    next_waiter: u64,
}

/// Number of reserved bytes of a tenant, and number of its first waiter.
type Rank = (usize, u64);

#[derive(Default)]
struct Tenant {
    used: usize,
    /// Waiters, in the order of their numbers.
    waiters: VecDeque<Waiter>,
}

struct Waiter {
    number: u64,
    bytes: usize,
    granted: oneshot::Sender<Reservation>,
}

impl fmt::Debug for MemoryBudget {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("MemoryBudget").field("limit", &self.limit).finish_non_exhaustive()
    }
}

impl MemoryBudget {
    /// Creates a budget of `limit` bytes.
    #[must_use]
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { limit, state: Mutex::default() })
    }

    /// Calls `observer` with the number of reserved bytes whenever it changes. `observer` must not block.
    pub fn observe(&self, observer: impl Fn(usize) + Send + Sync + 'static) {
        self.state.lock().observer = Some(Box::new(observer));
    }

    /// Returns the number of reserved bytes.
    #[must_use]
    pub fn used(&self) -> usize {
        self.state.lock().used
    }

    /// Returns the number of bytes that `tenant` can reserve now.
    #[must_use]
    pub fn available_to(&self, tenant: &str) -> usize {
        let state = self.state.lock();
        let free = self.limit - state.used;
        match state.tenants.get(tenant) {
            None => free,
            Some(tenant) if tenant.waits() => 0,
            Some(tenant) => free.saturating_sub(tenant.used),
        }
    }

    /// Reserves bytes for a tenant if the budget has capacity now; returns `None` otherwise.
    pub fn try_reserve(self: &Arc<Self>, tenant: &Arc<str>, bytes: usize) -> Option<Reservation> {
        if bytes == 0 {
            return Some(Reservation::default());
        }
        let bytes = bytes.min(self.limit);
        let mut state = self.state.lock();
        if !state.is_next(tenant) || !state.has_room(tenant, bytes, self.limit) {
            return None;
        }
        state.add(tenant, bytes);
        Some(self.reservation(tenant, bytes))
    }

    /// Reserves bytes for a tenant, and waits until the budget has capacity. A reservation that is larger than the
    /// budget is reduced to the whole budget.
    pub async fn reserve(self: &Arc<Self>, tenant: &Arc<str>, bytes: usize) -> Reservation {
        if bytes == 0 {
            return Reservation::default();
        }
        let bytes = bytes.min(self.limit);
        let (number, granted) = {
            let mut state = self.state.lock();
            if state.is_next(tenant) && state.has_room(tenant, bytes, self.limit) {
                state.add(tenant, bytes);
                return self.reservation(tenant, bytes);
            }
            state.add_waiter(tenant, bytes)
        };
        let _guard = WaiterGuard { budget: self, tenant, number };
        // The sender is dropped only together with the budget, which `self` keeps alive.
        granted.await.unwrap_or_default()
    }

    fn reservation(self: &Arc<Self>, tenant: &Arc<str>, bytes: usize) -> Reservation {
        Reservation { of: Some((self.clone(), tenant.clone())), bytes }
    }

    fn release(self: &Arc<Self>, tenant: &Arc<str>, bytes: usize) {
        let mut state = self.state.lock();
        state.remove(tenant, bytes);
        self.grant(&mut state);
    }

    /// Serves waiters in order while the budget has capacity.
    fn grant(self: &Arc<Self>, state: &mut State) {
        while let Some((_, first)) = state.waiting.first().cloned() {
            let Some(waiter) = state.next_waiter(&first, self.limit) else { return };
            let reservation = self.reservation(&first, waiter.bytes);
            match waiter.granted.send(reservation) {
                // The waiter may drop the reservation immediately; the drop waits for the lock until the bytes are
                // added.
                Ok(()) => state.add(&first, waiter.bytes),
                Err(mut unwanted) => unwanted.bytes = 0,
            }
        }
    }
}

/// Removes a waiter when its call is dropped.
struct WaiterGuard<'a> {
    budget: &'a Arc<MemoryBudget>,
    tenant: &'a Arc<str>,
    number: u64,
}

impl Drop for WaiterGuard<'_> {
    fn drop(&mut self) {
        let mut state = self.budget.state.lock();
        if state.remove_waiter(self.tenant, self.number) {
            self.budget.grant(&mut state);
        }
    }
}

impl State {
    /// Returns whether a new reservation of `tenant` precedes all waiters.
    fn is_next(&self, tenant: &Arc<str>) -> bool {
        let (used, waits) = match self.tenants.get(tenant) {
            Some(tenant) => (tenant.used, tenant.waits()),
            None => (0, false),
        };
        !waits && self.waiting.first().is_none_or(|((first, _), _)| used < *first)
    }

    fn has_room(&self, tenant: &Arc<str>, bytes: usize, limit: usize) -> bool {
        let free = limit - self.used;
        match self.tenants.get(tenant).map_or(0, |tenant| tenant.used) {
            0 => bytes <= free,
            used => used + bytes <= free,
        }
    }

    fn add_waiter(
        &mut self,
        name: &Arc<str>,
        bytes: usize,
    ) -> (u64, oneshot::Receiver<Reservation>) {
        let (sender, granted) = oneshot::channel();
        let number = self.next_waiter;
        self.next_waiter += 1;
        self.change(name, |tenant| {
            tenant.waiters.push_back(Waiter { number, bytes, granted: sender });
        });
        (number, granted)
    }

    /// Removes and returns the first waiter of a tenant, if the budget has capacity for it.
    fn next_waiter(&mut self, name: &Arc<str>, limit: usize) -> Option<Waiter> {
        let bytes = self.tenants.get(name)?.waiters.front()?.bytes;
        if !self.has_room(name, bytes, limit) {
            return None;
        }
        self.change(name, |tenant| tenant.waiters.pop_front())
    }

    /// Removes a waiter. Returns whether it was waiting.
    fn remove_waiter(&mut self, name: &Arc<str>, number: u64) -> bool {
        if !self.tenants.contains_key(name) {
            return false;
        }
        self.change(name, |tenant| {
            let index = tenant.waiters.binary_search_by_key(&number, |waiter| waiter.number);
            index.ok().and_then(|index| tenant.waiters.remove(index)).is_some()
        })
    }

    fn add(&mut self, name: &Arc<str>, bytes: usize) {
        self.set_used(self.used + bytes);
        self.change(name, |tenant| tenant.used += bytes);
    }

    fn remove(&mut self, name: &Arc<str>, bytes: usize) {
        self.set_used(self.used - bytes);
        self.change(name, |tenant| tenant.used -= bytes);
    }

    fn set_used(&mut self, used: usize) {
        self.used = used;
        if let Some(observer) = &self.observer {
            observer(used);
        }
    }

    /// Changes a tenant and updates its rank among the waiting tenants. Removes the tenant if it is idle.
    fn change<T>(&mut self, name: &Arc<str>, change: impl FnOnce(&mut Tenant) -> T) -> T {
        let tenant = self.tenants.entry(name.clone()).or_default();
        let before = tenant.rank();
        let result = change(tenant);
        let (after, is_idle) = (tenant.rank(), tenant.used == 0 && !tenant.waits());
        if before != after {
            if let Some(before) = before {
                self.waiting.remove(&(before, name.clone()));
            }
            if let Some(after) = after {
                self.waiting.insert((after, name.clone()));
            }
        }
        if is_idle {
            self.tenants.remove(name);
        }
        result
    }
}

impl Tenant {
    fn waits(&self) -> bool {
        !self.waiters.is_empty()
    }

    /// Returns the rank of the tenant among the waiting tenants; `None` if it has no waiters.
    fn rank(&self) -> Option<Rank> {
        self.waiters.front().map(|first| (self.used, first.number))
    }
}

/// Bytes reserved in a [`MemoryBudget`], released when dropped.
#[derive(Debug, Default)]
pub struct Reservation {
    of: Option<(Arc<MemoryBudget>, Arc<str>)>,
    bytes: usize,
}

impl Reservation {
    /// Returns the number of reserved bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Adds the bytes of `other`, a reservation of the same tenant in the same budget.
    pub fn merge(&mut self, mut other: Self) {
        if self.of.is_none() {
            *self = other;
        } else {
            self.bytes += std::mem::take(&mut other.bytes);
        }
    }

    /// Splits off up to `bytes` bytes into a separate reservation.
    #[must_use]
    pub fn split(&mut self, bytes: usize) -> Self {
        let bytes = bytes.min(self.bytes);
        self.bytes -= bytes;
        Self { of: self.of.clone(), bytes }
    }

    fn release(&mut self) {
        let bytes = std::mem::take(&mut self.bytes);
        if let Some((budget, tenant)) = self.of.as_ref().filter(|_| bytes > 0) {
            budget.release(tenant, bytes);
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.release();
    }
}

#[cfg(test)]
mod tests;
