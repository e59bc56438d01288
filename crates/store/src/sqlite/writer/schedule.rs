//! Decides which operations the writer commits next.
//!
//! Small operations, such as the renewal of a lease or the end of a small request, wait for at most
//! one group of large ones. After such a group they have the writer for at least as long as the
//! group took: the steps of a small request follow each other by less than a millisecond, and
//! otherwise each would wait for a separate group. Large operations take turns by tenant
//! (start-time fair queueing over bytes), and keep half of the writer's time.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    time::{Duration, Instant},
};

/// Maximum number of operations of one commit, which bounds how long the first of them waits.
const MAX_GROUP_OPERATIONS: usize = 512;
/// Bytes after which a group is complete; its last operation may exceed them.
const MAX_GROUP_BYTES: usize = 256 * 1024;
/// Time that the writer waits for the next step of a small request before it starts large
/// operations.
const NEXT_STEP_WAIT: Duration = Duration::from_millis(1);

/// Operations in commit order. A group must be committed before the next one is requested.
pub(super) struct Schedule<T> {
    small: VecDeque<(T, usize)>,
    large: FairQueue<T>,
    /// The group that is being committed.
    current: Option<Group>,
    /// When the last group of large operations ended, and its duration.
    last_large: Option<(Instant, Duration)>,
    /// When the last group of small operations ended, if that was after the last large one.
    last_small: Option<Instant>,
}

#[derive(Clone, Copy)]
struct Group {
    is_large: bool,
    since: Instant,
}

/// Next step of the writer.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Commit the group.
    Group,
    /// Call again after this time, or when an operation was added.
    Wait(Duration),
    /// Call again when an operation was added.
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

    /// Returns the number of small operations.
    pub(super) fn small_len(&self) -> usize {
        self.small.len()
    }

    /// Returns the number of large operations.
    pub(super) fn large_len(&self) -> usize {
        self.large.len
    }

    /// Moves the next group into `group`, if one is due.
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
            (false, false) => self.is_large_turn(now),
        };
        let mut bytes = 0;
        while group.len() < MAX_GROUP_OPERATIONS && bytes < MAX_GROUP_BYTES {
            let first = if is_large { self.large.pop() } else { self.small.pop_front() };
            let Some((operation, size)) = first else { break };
            bytes += size;
            group.push(operation);
        }
        self.current = Some(Group { is_large, since: now });
        Next::Group
    }

    /// Records that the last group was committed.
    pub(super) fn group_committed(&mut self, now: Instant) {
        match self.current.take() {
            Some(Group { is_large: true, since }) => {
                self.last_large = Some((now, now.saturating_duration_since(since)));
                self.last_small = None;
            }
            Some(Group { is_large: false, .. }) => self.last_small = Some(now),
            None => {}
        }
    }

    /// Returns until when the writer is reserved for small operations.
    fn reserved_until(&self) -> Option<Instant> {
        let (ended, took) = self.last_large?;
        self.last_small.map(|last| (last + NEXT_STEP_WAIT).min(ended + took))
    }

    /// Returns whether waiting large operations come before waiting small ones.
    fn is_large_turn(&self, now: Instant) -> bool {
        match (self.last_large, self.last_small) {
            (Some((ended, took)), Some(_)) => now >= ended + took,
            (None, Some(_)) => true,
            (_, None) => false,
        }
    }
}

/// Operations of tenants that take turns. The tenant that has received the fewest bytes since it
/// has operations here is next (P. Goyal, H. Vin and H. Cheng, "Start-time Fair Queueing", 1996).
struct FairQueue<T> {
    len: usize,
    tenants: HashMap<String, VecDeque<(T, usize)>>,
    /// Names of the tenants with operations, by start tag of the first one and order of arrival.
    order: BTreeMap<(u64, u64), String>,
    /// Start tag of the last dequeued operation.
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
            schedule.add_large("acme".into(), MAX_GROUP_BYTES / 2, number);
        }
        schedule.add_small(1, 10);
        schedule.add_small(1, 11);
        assert_eq!(next(&mut schedule, now), (Next::Group, vec![10, 11]));
        schedule.group_committed(now);
        schedule.add_small(1, 12);
        assert_eq!(next(&mut schedule, now), (Next::Group, vec![0, 1]));
        schedule.group_committed(now + 5 * MS);
        assert_eq!(next(&mut schedule, now + 5 * MS), (Next::Group, vec![12]));
    }

    #[test]
    fn small_operations_get_as_much_time_as_the_large_group_before_them() {
        let (mut schedule, now) = (Schedule::default(), Instant::now());
        for number in 0..2 {
            schedule.add_large("acme".into(), MAX_GROUP_BYTES, number);
        }
        assert_eq!(next(&mut schedule, now), (Next::Group, vec![0]));
        let ended = now + 5 * MS;
        schedule.group_committed(ended);
        schedule.add_small(1, 10);
        assert_eq!(next(&mut schedule, ended), (Next::Group, vec![10]));
        schedule.group_committed(ended + MS);
        assert_eq!(next(&mut schedule, ended + MS), (Next::Wait(NEXT_STEP_WAIT), vec![]));
        schedule.add_small(1, 11);
        assert_eq!(
            next(&mut schedule, ended + MS),
            (Next::Group, vec![11]),
            "the next step of the small request"
        );
        schedule.group_committed(ended + 5 * MS);
        schedule.add_small(1, 12);
        assert_eq!(
            next(&mut schedule, ended + 5 * MS),
            (Next::Group, vec![1]),
            "large operations keep half of the time"
        );
    }

    #[test]
    fn large_operations_do_not_wait_without_small_ones() {
        let (mut schedule, now) = (Schedule::default(), Instant::now());
        for number in 0..2 {
            schedule.add_large("acme".into(), MAX_GROUP_BYTES, number);
        }
        assert_eq!(next(&mut schedule, now), (Next::Group, vec![0]));
        schedule.group_committed(now + 5 * MS);
        assert_eq!(next(&mut schedule, now + 5 * MS), (Next::Group, vec![1]));
        schedule.group_committed(now + 10 * MS);
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
