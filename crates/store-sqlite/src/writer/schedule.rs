//! Decides which operations the writer commits next.
//!
//! Small operations, such as the end of a small request, wait for at most one group of large operations. After such a
//! group, the writer is reserved for small operations for the duration of the group: the steps of a small request
//! follow each other within less than a millisecond, and without the reservation, each step would wait for a separate
//! group. Among small operations, those of the server, such as renewals of leases, come first. Large operations take
//! turns by tenant (start-time fair queueing over bytes), and receive at least half of the writer's time.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use streamer_core::FairTags;

/// Maximum number of operations in one group, which limits the time that the first operation waits.
const MAX_GROUP_OPERATIONS: usize = 512;
/// Size at which a group is complete, in bytes. The last operation of a group may exceed it.
const MAX_GROUP_BYTES: usize = 256 * 1024;
/// Maximum time that the writer waits for the next step of a small request before it starts large operations.
const NEXT_STEP_WAIT: Duration = Duration::from_millis(1);

/// Selects the operations to commit next. A group must be committed before the next group is requested.
pub(super) struct Schedule<T> {
    server: VecDeque<(T, usize)>,
    small: VecDeque<(T, usize)>,
    large: FairQueue<T>,
    /// Group that is being committed.
    current: Option<Group>,
    /// Time at which the last group of large operations was committed, and its duration.
    last_large: Option<(Instant, Duration)>,
    /// Time at which the last group of small operations was committed, if that was after the last large group.
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
    /// Call again after the given time, or after an operation is added.
    Wait(Duration),
    /// Call again after an operation is added.
    Nothing,
}

impl<T> Default for Schedule<T> {
    fn default() -> Self {
        Self {
            server: VecDeque::new(),
            small: VecDeque::new(),
            large: FairQueue::default(),
            current: None,
            last_large: None,
            last_small: None,
        }
    }
}

impl<T> Schedule<T> {
    /// Adds a small operation. Operations of the server, such as lease renewals, are committed first.
    pub(super) fn add_small(&mut self, is_of_server: bool, bytes: usize, operation: T) {
        let queue = if is_of_server { &mut self.server } else { &mut self.small };
        queue.push_back((operation, bytes));
    }

    pub(super) fn add_large(&mut self, tenant: Arc<str>, bytes: usize, operation: T) {
        self.large.push(tenant, bytes, operation);
    }

    /// Moves the next group into `group`, if one is due.
    pub(super) fn next(&mut self, now: Instant, group: &mut Vec<T>) -> Next {
        let is_large = match (self.server.is_empty() && self.small.is_empty(), self.large.len == 0)
        {
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
            let first = if is_large {
                self.large.pop()
            } else {
                self.server.pop_front().or_else(|| self.small.pop_front())
            };
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

    /// Returns the time until which the writer is reserved for small operations.
    fn reserved_until(&self) -> Option<Instant> {
        let (ended, took) = self.last_large?;
        self.last_small.map(|last| (last + NEXT_STEP_WAIT).min(ended + took))
    }

    /// Returns whether the next group consists of large operations while small operations are also waiting.
    fn is_large_turn(&self, now: Instant) -> bool {
        match (self.last_large, self.last_small) {
            (Some((ended, took)), Some(_)) => now >= ended + took,
            (None, Some(_)) => true,
            (_, None) => false,
        }
    }
}

/// Queue in which tenants take turns. The next operation is the one with the smallest start tag.
struct FairQueue<T> {
    len: usize,
    /// Operations and their sizes, by tenant; no tenant has an empty list.
    operations: HashMap<Arc<str>, VecDeque<(T, usize)>>,
    /// Names of these tenants, ordered by the start tag of their first operation and by arrival.
    order: BTreeMap<(u64, u64), Arc<str>>,
    /// Accounts of the other tenants.
    idle: FairTags<u64>,
    arrivals: u64,
}

impl<T> Default for FairQueue<T> {
    fn default() -> Self {
        Self {
            len: 0,
            operations: HashMap::new(),
            order: BTreeMap::new(),
            idle: FairTags::default(),
            arrivals: 0,
        }
    }
}

impl<T> FairQueue<T> {
    fn push(&mut self, tenant: Arc<str>, bytes: usize, operation: T) {
        self.len += 1;
        let operations = self.operations.entry(tenant.clone()).or_default();
        operations.push_back((operation, bytes));
        if operations.len() == 1 {
            self.enqueue(self.idle.start_tag(&tenant), tenant);
        }
    }

    fn pop(&mut self) -> Option<(T, usize)> {
        let ((start, _), tenant) = self.order.pop_first()?;
        self.idle.start(start);
        let operations = self.operations.get_mut(&tenant)?;
        let (operation, bytes) = operations.pop_front()?;
        self.len -= 1;
        let finish = start.saturating_add(bytes as u64);
        if operations.is_empty() {
            self.operations.remove(&tenant);
            self.idle.finish(&tenant, finish);
        } else {
            self.enqueue(finish, tenant);
        }
        if self.len == 0 {
            self.idle.clear();
        }
        Some((operation, bytes))
    }

    fn enqueue(&mut self, start: u64, tenant: Arc<str>) {
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
        schedule.add_small(false, 1, 10);
        schedule.add_small(false, 1, 11);
        assert_eq!(next(&mut schedule, now), (Next::Group, vec![10, 11]));
        schedule.group_committed(now);
        schedule.add_small(false, 1, 12);
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
        schedule.add_small(false, 1, 10);
        assert_eq!(next(&mut schedule, ended), (Next::Group, vec![10]));
        schedule.group_committed(ended + MS);
        assert_eq!(next(&mut schedule, ended + MS), (Next::Wait(NEXT_STEP_WAIT), vec![]));
        schedule.add_small(false, 1, 11);
        assert_eq!(
            next(&mut schedule, ended + MS),
            (Next::Group, vec![11]),
            "the next step of the small request"
        );
        schedule.group_committed(ended + 5 * MS);
        schedule.add_small(false, 1, 12);
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
        assert!(queue.operations.is_empty(), "no tenant is remembered when the queue is empty");
        queue.push("flooder".into(), 1000, ("flooder", 4));
        assert_eq!((queue.len, queue.operations.len(), queue.order.len()), (1, 1, 1));
    }

    #[test]
    fn a_tenant_with_one_operation_at_a_time_is_charged_for_it() {
        let mut queue = FairQueue::default();
        for number in 0..20 {
            queue.push("many".into(), 100, ("many", number));
        }
        let mut taken = Vec::new();
        queue.push("large".into(), 1000, ("large", 0));
        for _ in 0..12 {
            let ((tenant, _), _) = queue.pop().unwrap();
            if tenant == "large" {
                queue.push("large".into(), 1000, ("large", 0));
            }
            taken.push(tenant);
        }
        assert_eq!(taken.iter().filter(|tenant| **tenant == "large").count(), 2, "{taken:?}");
    }

    #[test]
    fn operations_of_the_server_are_committed_first() {
        let (mut schedule, now) = (Schedule::default(), Instant::now());
        schedule.add_small(false, 1, 1);
        schedule.add_small(true, 1, 2);
        assert_eq!(next(&mut schedule, now), (Next::Group, vec![2, 1]));
    }
}
