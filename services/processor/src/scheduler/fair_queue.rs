//! Orders due requests: by priority, then fairly among tenants, then fairly among the users of a tenant, then by age,
//! oldest first.
//!
//! Tenants and users with fewer running attempts come first. Start-time fair queueing breaks ties: each start costs 1.
//! The priority of a request grows while it waits, so that a request of a low priority starts eventually.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, HashMap, VecDeque},
    time::Duration,
};

use streamer_core::{FairTags, Timestamp, Uid, limits};
use streamer_store::DueRequest;

/// Maximum number of tenants whose users have turns; when it is exceeded, the turns of all users begin again.
const MAX_TENANTS: usize = 4096;

/// Start-time fair queue of tenants and of their users.
#[derive(Debug)]
pub(crate) struct FairQueue {
    tenants: FairTags<u64>,
    /// Users by tenant: the turns of a tenant's users do not depend on those of other tenants.
    users: HashMap<String, FairTags<u64>>,
    aging: Duration,
}

/// Numbers of running attempts, by tenant. An ordered request counts as a running attempt.
#[derive(Clone, Debug, Default)]
pub(crate) struct Load(HashMap<String, TenantLoad>);

#[derive(Clone, Debug, Default)]
struct TenantLoad {
    attempts: u32,
    by_user: HashMap<String, u32>,
}

impl Load {
    /// Adds a running attempt.
    pub(crate) fn add(&mut self, tenant: &str, user: &str) {
        update(&mut self.0, tenant, |of_tenant| {
            of_tenant.attempts += 1;
            update(&mut of_tenant.by_user, user, |attempts| *attempts += 1);
        });
    }

    fn of_tenant(&self, tenant: &str) -> u32 {
        self.0.get(tenant).map_or(0, |of_tenant| of_tenant.attempts)
    }

    fn of_user(&self, tenant: &str, user: &str) -> u32 {
        let of_user = self.0.get(tenant).and_then(|of_tenant| of_tenant.by_user.get(user));
        of_user.copied().unwrap_or(0)
    }
}

/// Changes the value of a name, of which a copy is made only if it is new.
fn update<T: Default>(values: &mut HashMap<String, T>, name: &str, change: impl FnOnce(&mut T)) {
    match values.get_mut(name) {
        Some(value) => change(value),
        None => change(values.entry(name.to_owned()).or_default()),
    }
}

impl FairQueue {
    /// Creates a queue in which the priority of a request grows by 1 for each `aging`; zero means never.
    pub(crate) fn new(aging: Duration) -> Self {
        Self { tenants: FairTags::default(), users: HashMap::new(), aging }
    }

    /// Charges a tenant and its user for the start of a request.
    pub(crate) fn charge(&mut self, tenant: &str, user: &str) {
        charge(&mut self.tenants, tenant);
        if self.users.len() >= MAX_TENANTS && !self.users.contains_key(tenant) {
            self.users.clear();
        }
        update(&mut self.users, tenant, |users| charge(users, user));
    }

    /// Orders due requests.
    pub(crate) fn order(
        &self,
        due: Vec<DueRequest>,
        load: &Load,
        now: Timestamp,
    ) -> Vec<DueRequest> {
        let mut ordered = Vec::with_capacity(due.len());
        let mut queues = self.tenant_queues(due, load, now);
        let mut heads: BinaryHeap<Reverse<(Head, usize)>> = queues
            .iter()
            .enumerate()
            .filter_map(|(index, queue)| Some(Reverse((queue.head()?.0, index))))
            .collect();
        while let Some(Reverse((_, index))) = heads.pop() {
            let queue = &mut queues[index];
            ordered.extend(queue.pop());
            if let Some((next, _)) = queue.head() {
                heads.push(Reverse((next, index)));
            }
        }
        ordered
    }

    fn tenant_queues(&self, due: Vec<DueRequest>, load: &Load, now: Timestamp) -> Vec<TenantQueue> {
        let mut indices: HashMap<String, usize> = HashMap::new();
        let mut queues: Vec<TenantQueue> = Vec::new();
        for request in due {
            let index = match indices.get(&request.tenant) {
                Some(index) => *index,
                None => {
                    let tenant = &request.tenant;
                    queues.push(TenantQueue {
                        turn: Turn {
                            load: load.of_tenant(tenant),
                            tag: self.tenants.start_tag(tenant),
                        },
                        users: Vec::new(),
                    });
                    indices.insert(tenant.clone(), queues.len() - 1);
                    queues.len() - 1
                }
            };
            let priority = self.aged_priority(&request, now);
            let queue = &mut queues[index];
            let of_user = |user: &&mut UserQueue| user.user == request.user;
            let user = match queue.users.iter_mut().find(of_user) {
                Some(user) => user,
                None => {
                    queue.users.push(UserQueue {
                        user: request.user.clone(),
                        turn: Turn {
                            load: load.of_user(&request.tenant, &request.user),
                            tag: self
                                .users
                                .get(&request.tenant)
                                .map_or(0, |users| users.start_tag(&request.user)),
                        },
                        levels: Vec::new(),
                    });
                    let last = queue.users.len() - 1;
                    &mut queue.users[last]
                }
            };
            user.push(priority, request);
        }
        queues
    }

    /// Returns the priority of a request at the given time.
    fn aged_priority(&self, request: &DueRequest, now: Timestamp) -> i32 {
        if self.aging.is_zero() {
            return request.priority;
        }
        let waited = now.since(request.not_before).as_millis();
        let steps = waited / self.aging.as_millis().max(1);
        let steps = i32::try_from(steps).unwrap_or(i32::MAX);
        // A priority above the highest one keeps its rank among others.
        request.priority.saturating_add(steps).min(limits::MAX_PRIORITY.max(request.priority))
    }
}

fn charge(tags: &mut FairTags<u64>, name: &str) {
    let tag = tags.start_tag(name);
    tags.start(tag);
    tags.finish(&name.into(), tag + 1);
}

/// When a tenant or a user comes next: the one with the lowest value is first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Turn {
    /// Number of running attempts.
    load: u32,
    /// Start tag.
    tag: u64,
}

impl Turn {
    fn advance(&mut self) {
        self.load += 1;
        self.tag += 1;
    }
}

/// Due requests of one tenant.
struct TenantQueue {
    turn: Turn,
    users: Vec<UserQueue>,
}

/// Due requests of one user.
struct UserQueue {
    user: String,
    turn: Turn,
    levels: Vec<Level>,
}

/// Requests for the same action and with the same priority, in the order of the page.
struct Level {
    /// Priority, including that for age.
    priority: i32,
    /// Priority of the submission.
    stored: i32,
    action: String,
    requests: VecDeque<DueRequest>,
}

/// Sort key of a tenant; the lowest key is first.
type Head = (Reverse<i32>, Turn, Timestamp, Uid);
/// Sort key of a user without its turn; the lowest key is first.
type UserHead = (Reverse<i32>, Timestamp, Uid);
/// Positions of the next user of a tenant, and of the level of that user.
type Position = (usize, usize);

impl TenantQueue {
    /// Returns the key and the position of the next request of this tenant.
    fn head(&self) -> Option<(Head, Position)> {
        let heads = self.users.iter().enumerate().filter_map(|(index, user)| {
            let ((priority, due, uid), level) = user.head()?;
            Some(((priority, user.turn, due, uid), (index, level)))
        });
        let ((priority, _, due, uid), position) = heads.min()?;
        Some(((priority, self.turn, due, uid), position))
    }

    fn pop(&mut self) -> Option<DueRequest> {
        let (_, (user, level)) = self.head()?;
        self.turn.advance();
        let user = &mut self.users[user];
        user.turn.advance();
        user.levels[level].requests.pop_front()
    }
}

impl UserQueue {
    fn push(&mut self, priority: i32, request: DueRequest) {
        let is_of_level = |level: &&mut Level| {
            level.priority == priority
                && level.stored == request.priority
                && level.action == request.action
        };
        match self.levels.iter_mut().find(is_of_level) {
            Some(level) => level.requests.push_back(request),
            None => self.levels.push(Level {
                priority,
                stored: request.priority,
                action: request.action.clone(),
                requests: VecDeque::from([request]),
            }),
        }
    }

    /// Returns the key of the next request of this user, and the position of its level.
    fn head(&self) -> Option<(UserHead, usize)> {
        let heads = self.levels.iter().enumerate().filter_map(|(index, level)| {
            let first = level.requests.front()?;
            Some(((Reverse(level.priority), first.not_before, first.uid), index))
        });
        heads.min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Timestamp = Timestamp::from_millis(1_000_000);

    fn due(tenant: &str, user: &str, priority: i32, age: i64) -> DueRequest {
        DueRequest {
            uid: Uid::new(Timestamp::from_millis(age)),
            action: "a".into(),
            tenant: tenant.into(),
            user: user.into(),
            priority,
            not_before: Timestamp::from_millis(age),
        }
    }

    fn names(ordered: &[DueRequest]) -> Vec<String> {
        let name = |request: &DueRequest| {
            format!("{}{}{}", request.tenant, request.user, request.not_before.as_millis())
        };
        ordered.iter().map(name).collect()
    }

    fn queue() -> FairQueue {
        FairQueue::new(Duration::ZERO)
    }

    fn load(running: &[(&str, &str)]) -> Load {
        let mut load = Load::default();
        running.iter().for_each(|(tenant, user)| load.add(tenant, user));
        load
    }

    #[test]
    fn tenants_alternate_and_the_oldest_request_of_each_is_first() {
        let waiting = vec![
            due("a", "", 0, 1),
            due("a", "", 0, 2),
            due("b", "", 0, 8),
            due("a", "", 0, 3),
            due("b", "", 0, 9),
        ];
        let ordered = queue().order(waiting, &Load::default(), NOW);
        assert_eq!(names(&ordered), ["a1", "b8", "a2", "b9", "a3"]);
    }

    #[test]
    fn priority_precedes_the_least_running_tenant() {
        let waiting =
            vec![due("a", "", 9, 7), due("a", "", 0, 1), due("b", "", 0, 8), due("b", "", 0, 9)];
        let ordered = queue().order(waiting, &load(&[("a", "")]), NOW);
        assert_eq!(names(&ordered), ["a7", "b8", "b9", "a1"]);
    }

    #[test]
    fn users_of_a_tenant_alternate() {
        let waiting = vec![
            due("a", "x", 0, 1),
            due("a", "x", 0, 2),
            due("a", "x", 0, 3),
            due("a", "y", 0, 5),
            due("b", "z", 0, 4),
        ];
        let ordered = queue().order(waiting.clone(), &Load::default(), NOW);
        assert_eq!(names(&ordered), ["ax1", "bz4", "ay5", "ax2", "ax3"]);
        let ordered = queue().order(waiting, &load(&[("a", "x"), ("b", "z")]), NOW);
        assert_eq!(names(&ordered), ["bz4", "ay5", "ax1", "ax2", "ax3"]);
    }

    #[test]
    fn priority_precedes_the_turn_of_a_user() {
        let waiting = vec![due("a", "x", 5, 3), due("a", "x", 5, 4), due("a", "y", 0, 1)];
        let ordered = queue().order(waiting, &load(&[("a", "x")]), NOW);
        assert_eq!(names(&ordered), ["ax3", "ax4", "ay1"]);
    }

    #[test]
    fn tenants_and_users_alternate_across_separate_scans() {
        let mut queue = queue();
        let mut waiting = vec![
            due("a", "x", 0, 1),
            due("a", "x", 0, 2),
            due("a", "y", 0, 3),
            due("b", "z", 0, 8),
            due("b", "z", 0, 9),
        ];
        let mut started = Vec::new();
        while !waiting.is_empty() {
            let first = queue.order(waiting.clone(), &Load::default(), NOW).remove(0);
            queue.charge(&first.tenant, &first.user);
            waiting.retain(|request| request.uid != first.uid);
            started.push(first);
        }
        assert_eq!(names(&started), ["ax1", "bz8", "ay3", "bz9", "ax2"]);
    }

    #[test]
    fn users_alternate_also_beside_another_tenant() {
        let mut queue = queue();
        let mut waiting: Vec<DueRequest> = (0..20).map(|age| due("a", "x", 0, age)).collect();
        waiting.extend((100..120).map(|age| due("a", "y", 0, age)));
        waiting.extend((0..40).map(|age| due("b", "z", 0, age)));
        let mut started = Vec::new();
        for _ in 0..40 {
            let first = queue.order(waiting.clone(), &Load::default(), NOW).remove(0);
            queue.charge(&first.tenant, &first.user);
            waiting.retain(|request| request.uid != first.uid);
            started.push(first.user);
        }
        let count = |user: &str| started.iter().filter(|started| *started == user).count();
        assert_eq!((count("x"), count("y"), count("z")), (10, 10, 20), "{started:?}");
    }

    #[test]
    fn the_number_of_tenants_with_turns_is_limited() {
        let mut queue = queue();
        (0..=MAX_TENANTS).for_each(|number| queue.charge(&number.to_string(), "u"));
        assert_eq!(queue.users.len(), 1);
    }

    #[test]
    fn the_oldest_request_of_all_actions_is_first() {
        let for_action =
            |action: &str, age| DueRequest { action: action.into(), ..due("a", "x", 0, age) };
        let waiting =
            vec![for_action("a", 2), for_action("a", 4), for_action("b", 1), for_action("b", 3)];
        let ordered = queue().order(waiting, &Load::default(), NOW);
        assert_eq!(names(&ordered), ["ax1", "ax2", "ax3", "ax4"]);
    }

    #[test]
    fn a_new_tenant_gets_no_credit_for_idle_time() {
        let mut queue = queue();
        (0..100).for_each(|_| queue.charge("a", "x"));
        let waiting = vec![
            due("a", "x", 0, 1),
            due("a", "x", 0, 2),
            due("b", "z", 0, 8),
            due("b", "z", 0, 9),
        ];
        let ordered = queue.order(waiting, &Load::default(), NOW);
        assert_eq!(names(&ordered), ["bz8", "ax1", "bz9", "ax2"]);
    }

    #[test]
    fn the_priority_of_a_waiting_request_grows_to_the_highest() {
        let queue = FairQueue::new(Duration::from_secs(100));
        let priority_after = |waited: i64, priority| {
            let request = due("a", "x", priority, NOW.as_millis() - waited);
            queue.aged_priority(&request, NOW)
        };
        for (waited, priority, aged) in [
            (0, 0, 0),
            (99_999, 0, 0),
            (100_000, 0, 1),
            (250_000, 3, 5),
            (999_000, 3, 9),
            (-5_000, 3, 3),
        ] {
            assert_eq!(priority_after(waited, priority), aged, "{waited} {priority}");
        }
        let old = || due("a", "x", 0, 1);
        let flood = [due("b", "y", 9, 999_998), due("b", "y", 9, 999_999)];
        let waiting = || [&flood[..], &[old()]].concat();
        let aged = queue.order(waiting(), &load(&[("b", "y")]), NOW);
        assert_eq!(names(&aged), ["ax1", "by999998", "by999999"]);
        let unaged = FairQueue::new(Duration::ZERO).order(waiting(), &load(&[("b", "y")]), NOW);
        assert_eq!(names(&unaged), ["by999998", "by999999", "ax1"]);
    }

    #[test]
    fn an_aged_request_precedes_younger_ones_of_its_user() {
        let queue = FairQueue::new(Duration::from_secs(100));
        let waiting = vec![due("a", "x", 9, 999_999), due("a", "x", 0, 1)];
        assert_eq!(names(&queue.order(waiting, &Load::default(), NOW)), ["ax1", "ax999999"]);
    }
}
