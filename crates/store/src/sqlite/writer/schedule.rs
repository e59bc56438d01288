//! Decides which operations the writer commits next.
//!
//! Small operations, such as the renewal of a lease or the end of a small request, wait for at most one group of
//! large ones. After such a group they have the writer for at least as long as it took: the steps of a small
//! request follow each other by less than a millisecond, and each would otherwise wait for a group of its own.
//! Large operations take turns by tenant (start-time fair queueing over bytes), and keep half of the writer's time.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    time::{Duration, Instant},
};

/// Operations of one commit at most: bounds how long the first of them waits.
const GROUP: usize = 512;
/// Bytes of the operations of one commit, but for the last of them.
const GROUP_BYTES: usize = 256 * 1024;
/// How long the writer waits for the next step of a small request before it begins with large operations.
const NEXT_STEP: Duration = Duration::from_millis(1);

/// Operations in the order in which they are committed. A group is committed before the next one is asked for.
pub(super) struct Schedule<T> {
    small: VecDeque<(T, usize)>,
    large: FairQueue<T>,
    /// The group that is being committed.
    current: Option<Group>,
    /// When the last group of large operations ended, and how long it took.
    last_large: Option<(Instant, Duration)>,
    /// When the last group of small operations ended, if that was after the large ones.
    last_small: Option<Instant>,
}

#[derive(Clone, Copy)]
struct Group {
    is_large: bool,
    since: Instant,
}

/// What the writer does next.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Commit the group.
    Group,
    /// Ask again after this time, or when an operation was added.
    Wait(Duration),
    /// Ask again when an operation was added.
    Nothing,
}

impl<T> Default for Schedule<T> {
    fn default() -> Self {
        Self {
            small: VecDeque::new(),
            large: FairQueue::default(),
            current: None,
            last_large: None,
            last_small: None,
        }
    }
}

impl<T> Schedule<T> {
    pub(super) fn add_small(&mut self, bytes: usize, operation: T) {
        self.small.push_back((operation, bytes));
    }

    pub(super) fn add_large(&mut self, tenant: String, bytes: usize, operation: T) {
        self.large.push(tenant, bytes, operation);
    }

    /// Number of small operations.
    pub(super) fn small(&self) -> usize {
        self.small.len()
    }

    /// Number of large operations.
    pub(super) fn large(&self) -> usize {
        self.large.len
    }

    /// Moves the next group into `group`, if it is time for one.
    pub(super) fn next(&mut self, now: Instant, group: &mut Vec<T>) -> Next {
        let is_large = match (self.small.is_empty(), self.large.len == 0) {
            (true, true) => return Next::Nothing,
            (true, false) => {
                let wait = self.reserved_until().map(|at| at.saturating_duration_since(now));
                if let Some(wait) = wait.filter(|wait| !wait.is_zero()) {
                    return Next::Wait(wait);
                }
                true
            }
            (false, true) => false,
            (false, false) => self.is_turn_of_large(now),
        };
        let mut bytes = 0;
        while group.len() < GROUP && bytes < GROUP_BYTES {
            let first = if is_large { self.large.pop() } else { self.small.pop_front() };
            let Some((operation, size)) = first else { break };
            bytes += size;
            group.push(operation);
        }
        self.current = Some(Group { is_large, since: now });
        Next::Group
    }

    /// The last group was committed.
    pub(super) fn finished(&mut self, now: Instant) {
        match self.current.take() {
            Some(Group { is_large: true, since }) => {
                self.last_large = Some((now, now.saturating_duration_since(since)));
                self.last_small = None;
            }
            Some(Group { is_large: false, .. }) => self.last_small = Some(now),
            None => {}
        }
    }

    /// Until when a small operation may still come before the large ones.
    fn reserved_until(&self) -> Option<Instant> {
        let (ended, took) = self.last_large?;
        self.last_small.map(|last| (last + NEXT_STEP).min(ended + took))
    }

    /// Whether large operations come before the small ones that wait.
    fn is_turn_of_large(&self, now: Instant) -> bool {
        match (self.last_large, self.last_small) {
            (Some((ended, took)), Some(_)) => now >= ended + took,
            (None, Some(_)) => true,
            (_, None) => false,
        }
    }
}

/// Operations of tenants that take turns: the one that has had the fewest bytes since it has operations here
/// comes first (P. Goyal, H. Vin and H. Cheng, "Start-time Fair Queueing", 1996).
struct FairQueue<T> {
    len: usize,
    tenants: HashMap<String, VecDeque<(T, usize)>>,
    /// Names of the tenants with operations, by the start of the first one and the order of arrival.
    order: BTreeMap<(u64, u64), String>,
    /// The start of the operation that was taken last.
    virtual_time: u64,
    arrivals: u64,
}

impl<T> Default for FairQueue<T> {
    fn default() -> Self {
        Self {
            len: 0,
            tenants: HashMap::new(),
            order: BTreeMap::new(),
            virtual_time: 0,
            arrivals: 0,
        }
    }
}

impl<T> FairQueue<T> {
    fn push(&mut self, tenant: String, bytes: usize, operation: T) {
        self.len += 1;
        match self.tenants.get_mut(&tenant) {
            Some(operations) => operations.push_back((operation, bytes)),
            None => {
                self.enqueue(self.virtual_time, tenant.clone());
                self.tenants.insert(tenant, VecDeque::from([(operation, bytes)]));
            }
        }
    }

    fn pop(&mut self) -> Option<(T, usize)> {
        let ((start, _), tenant) = self.order.pop_first()?;
        self.virtual_time = start;
        let operations = self.tenants.get_mut(&tenant)?;
        let (operation, bytes) = operations.pop_front()?;
        self.len -= 1;
        if operations.is_empty() {
            self.tenants.remove(&tenant);
        } else {
            self.enqueue(start + bytes as u64, tenant);
        }
        Some((operation, bytes))
    }

    fn enqueue(&mut self, start: u64, tenant: String) {
        self.arrivals += 1;
        self.order.insert((start, self.arrivals), tenant);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn next(schedule: &mut Schedule<u32>, now: Instant) -> (Next, Vec<u32>) {
        let mut group = Vec::new();
        (schedule.next(now, &mut group), group)
    }

    #[test]
    fn small_operations_wait_for_one_group_of_large_ones() {
        let (mut schedule, now) = (Schedule::default(), Instant::now());
        for number in 0..4 {
            schedule.add_large("acme".into(), GROUP_BYTES / 2, number);
        }
        schedule.add_small(1, 10);
        schedule.add_small(1, 11);
        assert_eq!(next(&mut schedule, now), (Next::Group, vec![10, 11]));
        schedule.finished(now);
        schedule.add_small(1, 12);
        assert_eq!(next(&mut schedule, now), (Next::Group, vec![0, 1]));
        schedule.finished(now + 5 * MS);
        assert_eq!(next(&mut schedule, now + 5 * MS), (Next::Group, vec![12]));
    }

    #[test]
    fn after_large_operations_small_ones_have_the_writer_for_as_long() {
        let (mut schedule, now) = (Schedule::default(), Instant::now());
        for number in 0..2 {
            schedule.add_large("acme".into(), GROUP_BYTES, number);
        }
        assert_eq!(next(&mut schedule, now), (Next::Group, vec![0]));
        let ended = now + 5 * MS;
        schedule.finished(ended);
        schedule.add_small(1, 10);
        assert_eq!(next(&mut schedule, ended), (Next::Group, vec![10]));
        schedule.finished(ended + MS);
        assert_eq!(next(&mut schedule, ended + MS), (Next::Wait(NEXT_STEP), vec![]));
        schedule.add_small(1, 11);
        assert_eq!(next(&mut schedule, ended + MS), (Next::Group, vec![11]), "its next step");
        schedule.finished(ended + 5 * MS);
        schedule.add_small(1, 12);
        assert_eq!(next(&mut schedule, ended + 5 * MS), (Next::Group, vec![1]), "their half");
    }

    #[test]
    fn large_operations_do_not_wait_when_no_small_ones_come() {
        let (mut schedule, now) = (Schedule::default(), Instant::now());
        for number in 0..2 {
            schedule.add_large("acme".into(), GROUP_BYTES, number);
        }
        assert_eq!(next(&mut schedule, now), (Next::Group, vec![0]));
        schedule.finished(now + 5 * MS);
        assert_eq!(next(&mut schedule, now + 5 * MS), (Next::Group, vec![1]));
        schedule.finished(now + 10 * MS);
        assert_eq!(next(&mut schedule, now + 10 * MS), (Next::Nothing, vec![]));
    }

    #[test]
    fn tenants_with_large_operations_take_turns_by_bytes() {
        let mut queue = FairQueue::default();
        for number in 0..4 {
            queue.push("flooder".into(), 1000, ("flooder", number));
        }
        for number in 0..4 {
            queue.push("small".into(), 500, ("small", number));
        }
        let mut taken = || queue.pop().map(|((tenant, _), _)| tenant);
        let order: Vec<_> = std::iter::from_fn(&mut taken).collect();
        assert_eq!(
            order,
            ["flooder", "small", "small", "flooder", "small", "small", "flooder", "flooder"]
        );
        queue.push("flooder".into(), 1000, ("flooder", 4));
        assert_eq!((queue.len, queue.tenants.len(), queue.order.len()), (1, 1, 1));
    }
}
