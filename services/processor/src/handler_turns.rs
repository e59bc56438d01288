//! Fair use of the handler threads: handlers of one tenant that compute for a long time wait for each other and
//! leave threads for the handlers of other tenants; the operating system then divides the processors.

use std::{
    collections::{BTreeSet, HashMap, HashSet, VecDeque},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

use parking_lot::Mutex;

/// Permits to run on the handler threads; a turn is one poll of one handler. The number of concurrent turns of a
/// tenant is bounded. The next turn goes to the waiting tenant with the least processor time (start-time fair
/// queueing; the time of a tenant without handlers is not kept).
pub(crate) struct HandlerTurns {
    state: Mutex<State>,
}

struct State {
    /// Idle threads. If there are any, every waiting tenant is at its own limit.
    free: usize,
    /// Maximum number of concurrent turns of one tenant.
    max_of_tenant: usize,
    tenants: HashMap<Arc<str>, Tenant>,
    /// Tenants below their limit with waiting handlers, by processor time.
    waiting: BTreeSet<(Duration, Arc<str>)>,
    /// Waiting handlers whose turn was granted and has not begun.
    granted: HashSet<u64>,
    /// Processor time of the tenant that was granted the last turn; new tenants begin with it.
    virtual_time: Duration,
    next_number: u64,
}

#[derive(Default)]
struct Tenant {
    /// Virtual time at its first handler plus processor time since then.
    time: Duration,
    running: usize,
    waiters: VecDeque<(u64, Waker)>,
}

impl HandlerTurns {
    /// Creates turns for `threads` threads, of which one tenant uses at most `max_of_tenant`.
    pub(crate) fn new(threads: usize, max_of_tenant: usize) -> Arc<Self> {
        let state = State {
            free: threads.max(1),
            max_of_tenant: max_of_tenant.max(1),
            tenants: HashMap::new(),
            waiting: BTreeSet::new(),
            granted: HashSet::new(),
            virtual_time: Duration::ZERO,
            next_number: 0,
        };
        Arc::new(Self { state: Mutex::new(state) })
    }

    /// Returns a future that polls `future` in turns of this tenant.
    pub(crate) fn run<F: Future>(self: &Arc<Self>, tenant: Arc<str>, future: F) -> InTurns<F> {
        let ticket = Ticket { turns: self.clone(), tenant, number: None };
        InTurns { future: Box::pin(future), ticket }
    }
}

impl State {
    /// Begins a turn if a thread is available to this tenant.
    fn try_begin(&mut self, name: &Arc<str>) -> bool {
        let (free, max) = (self.free, self.max_of_tenant);
        let tenant = self.tenant(name);
        if free == 0 || tenant.running >= max || !tenant.waiters.is_empty() {
            return false;
        }
        tenant.running += 1;
        self.free -= 1;
        true
    }

    fn tenant(&mut self, name: &Arc<str>) -> &mut Tenant {
        let time = self.virtual_time;
        self.tenants.entry(name.clone()).or_insert_with(|| Tenant { time, ..Tenant::default() })
    }

    fn wait(&mut self, name: &Arc<str>, waker: Waker) -> u64 {
        let number = self.next_number;
        self.next_number += 1;
        let max = self.max_of_tenant;
        let tenant = self.tenant(name);
        tenant.waiters.push_back((number, waker));
        if tenant.running < max {
            let time = tenant.time;
            self.waiting.insert((time, name.clone()));
        }
        number
    }

    /// Begins the turn of a waiting handler if it was granted; otherwise replaces its waker.
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

    /// Ends a turn that took `took`. Returns the waker of the handler with the next turn.
    fn end(&mut self, name: &Arc<str>, took: Duration) -> Option<Waker> {
        self.free += 1;
        if let Some(tenant) = self.tenants.get_mut(name) {
            let before = tenant.time;
            tenant.time += took;
            tenant.running -= 1;
            let (after, waits) = (tenant.time, !tenant.waiters.is_empty());
            if waits {
                self.waiting.remove(&(before, name.clone()));
                self.waiting.insert((after, name.clone()));
            } else if tenant.running == 0 {
                self.tenants.remove(name);
            }
        }
        self.grant()
    }

    fn grant(&mut self) -> Option<Waker> {
        let (time, name) = self.waiting.pop_first()?;
        self.virtual_time = self.virtual_time.max(time);
        let tenant = self.tenants.get_mut(&name)?;
        let (number, waker) = tenant.waiters.pop_front()?;
        tenant.running += 1;
        if !tenant.waiters.is_empty() && tenant.running < self.max_of_tenant {
            self.waiting.insert((time, name));
        }
        self.free -= 1;
        self.granted.insert(number);
        Some(waker)
    }

    /// Removes a waiting handler. Returns the waker of the handler that gets its turn, if it had one.
    fn leave(&mut self, name: &Arc<str>, number: u64) -> Option<Waker> {
        if self.granted.remove(&number) {
            return self.end(name, Duration::ZERO);
        }
        let tenant = self.tenants.get_mut(name)?;
        tenant.waiters.retain(|waiter| waiter.0 != number);
        if tenant.waiters.is_empty() {
            self.waiting.remove(&(tenant.time, name.clone()));
            if tenant.running == 0 {
                self.tenants.remove(name);
            }
        }
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
    /// Number of the waiting handler; `None` while it does not wait.
    number: Option<u64>,
}

impl Ticket {
    /// Begins a turn, or waits for one. Returns whether the turn has begun.
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

/// A turn. It ends on drop, so that a handler that panics ends its turn too.
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
