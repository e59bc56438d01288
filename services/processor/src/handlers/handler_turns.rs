//! Shares the handler threads fairly. Handlers of one tenant that compute for a long time wait for each other, and
//! leave threads for the handlers of other tenants. The operating system divides the CPU time among the threads.

use std::{
    collections::{BTreeSet, HashMap, HashSet, VecDeque},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use streamer_core::FairTags;

/// Grants turns on the handler threads; a turn is one poll of one handler. The number of concurrent turns of a tenant
/// is limited. The next turn is granted to the waiting tenant with the least processor time (start-time fair queueing).
pub(crate) struct HandlerTurns {
    state: Mutex<State>,
}

struct State {
    /// Number of idle threads. If it is not 0, every tenant with waiting handlers has reached its limit.
    free: usize,
    /// Maximum number of concurrent turns of one tenant.
    max_of_tenant: usize,
    /// Tenants with running or waiting handlers.
    tenants: HashMap<Arc<str>, Tenant>,
    /// Processor times of the other tenants.
    idle: FairTags<Duration>,
    /// Tenants with waiting handlers that are below their limit, by processor time and the number of the first of these
    /// handlers.
    waiting: BTreeSet<(Duration, u64, Arc<str>)>,
    /// Numbers of waiting handlers whose turn was granted and has not begun.
    granted: HashSet<u64>,
    next_number: u64,
}

struct Tenant {
    /// Processor time, which includes the start tag.
    time: Duration,
    running: usize,
    waiters: VecDeque<(u64, Waker)>,
}

impl Tenant {
    fn new(time: Duration) -> Self {
        Self { time, running: 0, waiters: VecDeque::new() }
    }

    fn is_active(&self) -> bool {
        self.running > 0 || !self.waiters.is_empty()
    }
}

impl HandlerTurns {
    /// Creates turns for `threads` threads, of which each tenant uses at most `max_of_tenant`.
    pub(crate) fn new(threads: usize, max_of_tenant: usize) -> Arc<Self> {
        let state = State {
            free: threads.max(1),
            max_of_tenant: max_of_tenant.max(1),
            tenants: HashMap::new(),
            idle: FairTags::default(),
            waiting: BTreeSet::new(),
            granted: HashSet::new(),
            next_number: 0,
        };
        Arc::new(Self { state: Mutex::new(state) })
    }

    /// Returns a future that polls `future` in turns of the given tenant.
    pub(crate) fn run<F: Future>(self: &Arc<Self>, tenant: Arc<str>, future: F) -> InTurns<F> {
        let ticket = Ticket { turns: self.clone(), tenant, number: None };
        InTurns { future: Box::pin(future), ticket }
    }
}

impl State {
    /// Begins a turn if a thread is available to the given tenant; returns whether it has begun.
    fn try_begin(&mut self, name: &Arc<str>) -> bool {
        let (free, max) = (self.free, self.max_of_tenant);
        let can_begin = |tenant: &Tenant| tenant.running < max && tenant.waiters.is_empty();
        if free == 0 || !self.tenants.get(name).is_none_or(can_begin) {
            return false;
        }
        self.begin_turn(name, |_| ());
        true
    }

    /// Adds a waiting handler; returns its number.
    fn wait(&mut self, name: &Arc<str>, waker: Waker) -> u64 {
        let number = self.next_number;
        self.next_number += 1;
        self.change(name, |tenant| tenant.waiters.push_back((number, waker)));
        number
    }

    /// Counts a turn of a tenant.
    fn begin_turn<T>(&mut self, name: &Arc<str>, take: impl FnOnce(&mut Tenant) -> T) -> T {
        let (time, taken) = self.change(name, |tenant| {
            tenant.running += 1;
            (tenant.time, take(tenant))
        });
        self.free -= 1;
        self.idle.start(time);
        taken
    }

    /// Changes a tenant and updates its place in the order.
    fn change<T>(&mut self, name: &Arc<str>, change: impl FnOnce(&mut Tenant) -> T) -> T {
        let new = || Tenant::new(self.idle.start_tag(name));
        let tenant = self.tenants.entry(name.clone()).or_insert_with(new);
        let place = |tenant: &Tenant, max: usize| {
            let first = tenant.waiters.front().map(|(number, _)| *number)?;
            (tenant.running < max).then(|| (tenant.time, first, name.clone()))
        };
        if let Some(place) = place(tenant, self.max_of_tenant) {
            self.waiting.remove(&place);
        }
        let result = change(tenant);
        self.waiting.extend(place(tenant, self.max_of_tenant));
        if !tenant.is_active() {
            self.idle.finish(name, tenant.time);
            self.tenants.remove(name);
            if self.tenants.is_empty() {
                self.idle.clear();
            }
        }
        result
    }

    /// Begins the turn of a waiting handler if it was granted; otherwise replaces the handler's waker.
    fn begin(&mut self, name: &Arc<str>, number: u64, waker: &Waker) -> bool {
        if self.granted.remove(&number) {
            return true;
        }
        let waiters = self.tenants.get_mut(name).map(|tenant| &mut tenant.waiters);
        if let Some((_, old)) =
            waiters.and_then(|waiters| waiters.iter_mut().find(|waiter| waiter.0 == number))
        {
            old.clone_from(waker);
        }
        false
    }

    /// Ends a turn of the given duration. Returns the waker of the handler to which the next turn is granted, if any.
    fn end(&mut self, name: &Arc<str>, took: Duration) -> Option<Waker> {
        self.free += 1;
        self.change(name, |tenant| {
            tenant.time += took;
            tenant.running -= 1;
        });
        self.grant()
    }

    fn grant(&mut self) -> Option<Waker> {
        let (_, _, name) = self.waiting.first().cloned()?;
        let (number, waker) = self.begin_turn(&name, |tenant| tenant.waiters.pop_front())?;
        self.granted.insert(number);
        Some(waker)
    }

    /// Removes a waiting handler. If its turn was granted, returns the waker of the handler that receives the turn
    /// instead.
    fn leave(&mut self, name: &Arc<str>, number: u64) -> Option<Waker> {
        if self.granted.remove(&number) {
            return self.end(name, Duration::ZERO);
        }
        self.change(name, |tenant| tenant.waiters.retain(|waiter| waiter.0 != number));
        None
    }
}

/// Future that is polled in turns of its tenant.
pub(crate) struct InTurns<F> {
    future: Pin<Box<F>>,
    ticket: Ticket,
}

struct Ticket {
    turns: Arc<HandlerTurns>,
    tenant: Arc<str>,
    /// Number of the handler while it waits for a turn; otherwise `None`.
    number: Option<u64>,
}

impl Ticket {
    /// Begins a turn, or registers the handler as waiting. Returns whether the turn has begun.
    fn begin(&mut self, waker: &Waker) -> bool {
        let mut state = self.turns.state.lock();
        let has_begun = match self.number {
            Some(number) => state.begin(&self.tenant, number, waker),
            None => state.try_begin(&self.tenant),
        };
        if has_begun {
            self.number = None;
        } else if self.number.is_none() {
            self.number = Some(state.wait(&self.tenant, waker.clone()));
        }
        has_begun
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if let Some(number) = self.number {
            let next = self.turns.state.lock().leave(&self.tenant, number);
            next.into_iter().for_each(Waker::wake);
        }
    }
}

/// Turn in progress. It ends on drop, so that a handler that panics ends its turn too.
struct Turn<'a> {
    ticket: &'a Ticket,
    since: Instant,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let next = self.ticket.turns.state.lock().end(&self.ticket.tenant, self.since.elapsed());
        next.into_iter().for_each(Waker::wake);
    }
}

impl<F: Future> Future for InTurns<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<F::Output> {
        let this = &mut *self;
        if !this.ticket.begin(context.waker()) {
            return Poll::Pending;
        }
        let _turn = Turn { ticket: &this.ticket, since: Instant::now() };
        this.future.as_mut().poll(context)
    }
}

#[cfg(test)]
mod tests {
    use std::{future::pending, panic::AssertUnwindSafe};

    use futures_util::{FutureExt, poll};

    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn names() -> [Arc<str>; 2] {
        ["flooder".into(), "small".into()]
    }

    /// Ends a turn. Returns the number of the handler that is granted the next one.
    fn next(state: &mut State, name: &Arc<str>, took: Duration) -> Option<u64> {
        state.end(name, took);
        state.granted.drain().next()
    }

    #[test]
    fn the_tenant_with_the_least_processor_time_is_next() {
        let [flooder, small] = names();
        let turns = HandlerTurns::new(1, 1);
        let mut state = turns.state.lock();
        let waker = Waker::noop();
        assert!(state.try_begin(&flooder) && !state.try_begin(&flooder));
        let first: Vec<_> = (0..3).map(|_| state.wait(&flooder, waker.clone())).collect();
        assert_eq!(next(&mut state, &flooder, 5 * MS), Some(first[0]));
        let other: Vec<_> = (0..2).map(|_| state.wait(&small, waker.clone())).collect();
        assert_eq!(next(&mut state, &flooder, 5 * MS), Some(other[0]), "it began with 5 ms");
        assert_eq!(next(&mut state, &small, MS), Some(other[1]));
        assert_eq!(next(&mut state, &small, 5 * MS), Some(first[1]), "10 ms against 11");
        assert_eq!(next(&mut state, &flooder, MS), Some(first[2]));
        assert_eq!(next(&mut state, &flooder, MS), None);
        assert!(state.tenants.is_empty() && state.waiting.is_empty() && state.free == 1);
    }

    /// Ends the only turn of `name`, whose handler is ready for its next turn at once.
    fn yield_turn(state: &mut State, name: &Arc<str>, took: Duration) {
        state.end(name, took);
        if !state.try_begin(name) {
            state.wait(name, Waker::noop().clone());
        }
        state.granted.clear();
    }

    #[test]
    fn tenants_with_one_handler_that_yields_all_get_turns() {
        let names: Vec<Arc<str>> = ["a", "b", "c", "d"].map(Arc::from).to_vec();
        let turns = HandlerTurns::new(1, 1);
        let mut state = turns.state.lock();
        for name in &names {
            if !state.try_begin(name) {
                state.wait(name, Waker::noop().clone());
            }
        }
        let mut counts = HashMap::<Arc<str>, u32>::new();
        for _ in 0..4000 {
            let running = state.tenants.iter().find(|(_, tenant)| tenant.running > 0);
            let name = running.map(|(name, _)| name.clone()).unwrap();
            *counts.entry(name.clone()).or_default() += 1;
            yield_turn(&mut state, &name, MS);
        }
        assert!(names.iter().all(|name| counts[name] > 900), "{counts:?}");
    }

    #[test]
    fn a_tenant_that_used_idle_threads_is_not_starved_afterwards() {
        let [old, new] = names();
        let turns = HandlerTurns::new(1, 1);
        let mut state = turns.state.lock();
        assert!(state.try_begin(&old));
        for _ in 0..1000 {
            yield_turn(&mut state, &old, 100 * MS);
        }
        state.wait(&new, Waker::noop().clone());
        let mut of_old = 0;
        for _ in 0..100 {
            let is_old = state.tenants[&old].running > 0;
            of_old += u32::from(is_old);
            yield_turn(&mut state, if is_old { &old } else { &new }, MS);
        }
        assert!((40..=60).contains(&of_old), "{of_old}");
    }

    #[test]
    fn a_tenant_that_is_idle_for_a_moment_keeps_its_time() {
        let [greedy, modest] = names();
        let turns = HandlerTurns::new(1, 1);
        let mut state = turns.state.lock();
        assert!(state.try_begin(&greedy));
        let waits: Vec<_> = (0..3).map(|_| state.wait(&modest, Waker::noop().clone())).collect();
        assert_eq!(next(&mut state, &greedy, 100 * MS), Some(waits[0]));
        let again = state.wait(&greedy, Waker::noop().clone());
        assert_eq!(next(&mut state, &modest, MS), Some(waits[1]));
        assert_eq!(next(&mut state, &modest, MS), Some(waits[2]));
        assert_eq!(next(&mut state, &modest, MS), Some(again));
    }

    #[test]
    fn a_tenant_at_its_limit_leaves_threads_to_others() {
        let [flooder, small] = names();
        let turns = HandlerTurns::new(3, 2);
        let mut state = turns.state.lock();
        assert!(state.try_begin(&flooder) && state.try_begin(&flooder));
        assert!(!state.try_begin(&flooder));
        let waits = state.wait(&flooder, Waker::noop().clone());
        assert!(state.try_begin(&small));
        assert_eq!(next(&mut state, &small, MS), None, "the thread stays idle");
        assert!(state.try_begin(&small));
        assert_eq!(next(&mut state, &flooder, MS), Some(waits));
    }

    #[tokio::test]
    async fn dropping_a_waiting_handler_grants_its_turn_to_the_next() {
        let [flooder, small] = names();
        let turns = HandlerTurns::new(1, 1);
        assert!(turns.state.lock().try_begin(&flooder));
        let mut first = turns.run(small.clone(), pending::<()>());
        let mut second = turns.run(small.clone(), async { 2 });
        assert!(poll!(&mut first).is_pending() && poll!(&mut second).is_pending());
        turns.state.lock().end(&flooder, MS);
        assert!(poll!(&mut second).is_pending(), "the turn of the first");
        drop(first);
        assert_eq!(second.await, 2);
        let state = turns.state.lock();
        assert!(state.tenants.is_empty() && state.granted.is_empty() && state.free == 1);
    }

    #[tokio::test]
    async fn a_handler_that_panics_ends_its_turn() {
        let turns = HandlerTurns::new(1, 1);
        let panicking = turns.run("acme".into(), async { panic!("planned") });
        assert!(AssertUnwindSafe(panicking).catch_unwind().await.is_err());
        assert_eq!(turns.run("acme".into(), async { 1 }).await, 1);
    }
}
