//! In which order due requests start: highest priority first, then fair between tenants, then
//! oldest first.
//!
//! Fair means: the tenant with the least running comes first; among those, the one whose turn it is.
//! Turns are kept as in start-time fair queueing (Goyal, Vin and Cheng, 1996): every start moves its
//! tenant's tag on by one, and who comes anew begins where the others are.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, HashMap, VecDeque},
};

use parking_lot::Mutex;
use streamer_core::{Timestamp, Uid};
use streamer_store::DueRequest;

/// Tags beyond which those of tenants that nothing is owed are dropped.
const MAX_TAGS: usize = 4096;

/// Whose turn it is.
#[derive(Debug, Default)]
pub(crate) struct Turns {
    state: Mutex<State>,
}

#[derive(Clone, Debug, Default)]
struct State {
    /// The tag of the latest start: where a new tenant begins.
    now: u64,
    tags: HashMap<String, u64>,
}

impl State {
    fn tag(&self, tenant: &str) -> u64 {
        self.tags.get(tenant).copied().unwrap_or(0).max(self.now)
    }
}

impl Turns {
    /// A request of this tenant starts.
    pub(crate) fn took(&self, tenant: &str) {
        let mut state = self.state.lock();
        let tag = state.tag(tenant);
        state.now = tag;
        state.tags.insert(tenant.to_owned(), tag + 1);
        if state.tags.len() > MAX_TAGS {
            let now = state.now;
            state.tags.retain(|_, tag| *tag > now);
        }
    }

    /// Orders what the store says is due, tenant by tenant. `running` counts what runs of each
    /// tenant; every request taken here counts as running too.
    pub(crate) fn order(
        &self,
        due: Vec<DueRequest>,
        running: &HashMap<String, u32>,
    ) -> Vec<DueRequest> {
        let mut ordered = Vec::with_capacity(due.len());
        let mut queues = self.queues(due, running);
        let mut heads: BinaryHeap<Reverse<(Head, usize)>> = queues
            .iter()
            .enumerate()
            .filter_map(|(index, queue)| Some(Reverse((queue.head()?, index))))
            .collect();
        while let Some(Reverse((_, index))) = heads.pop() {
            let queue = &mut queues[index];
            ordered.extend(queue.requests.pop_front());
            queue.load += 1;
            queue.tag += 1;
            if let Some(next) = queue.head() {
                heads.push(Reverse((next, index)));
            }
        }
        ordered
    }

    fn queues(&self, due: Vec<DueRequest>, running: &HashMap<String, u32>) -> Vec<Queue> {
        let state = self.state.lock();
        let mut queues: Vec<Queue> = Vec::new();
        for request in due {
            match queues.last_mut() {
                Some(queue) if queue.is_of(&request.tenant) => queue.requests.push_back(request),
                _ => queues.push(Queue {
                    load: running.get(&request.tenant).copied().unwrap_or(0),
                    tag: state.tag(&request.tenant),
                    requests: VecDeque::from([request]),
                }),
            }
        }
        queues
    }
}

/// What one tenant has due.
struct Queue {
    load: u32,
    tag: u64,
    requests: VecDeque<DueRequest>,
}

/// Least first.
type Head = (Reverse<i32>, u32, u64, Timestamp, Uid);

impl Queue {
    fn is_of(&self, tenant: &str) -> bool {
        self.requests.back().is_some_and(|last| last.tenant == tenant)
    }

    fn head(&self) -> Option<Head> {
        let first = self.requests.front()?;
        Some((Reverse(first.priority), self.load, self.tag, first.not_before, first.uid))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn due(tenant: &str, priority: i32, age: i64) -> DueRequest {
        DueRequest {
            uid: Uid::new(Timestamp::from_millis(age)),
            action: "a".into(),
            tenant: tenant.into(),
            priority,
            not_before: Timestamp::from_millis(age),
        }
    }

    fn names(ordered: &[DueRequest]) -> Vec<String> {
        let name =
            |request: &DueRequest| format!("{}{}", request.tenant, request.not_before.as_millis());
        ordered.iter().map(name).collect()
    }

    #[test]
    fn tenants_take_turns_and_the_oldest_of_each_comes_first() {
        let waiting =
            vec![due("a", 0, 1), due("a", 0, 2), due("a", 0, 3), due("b", 0, 8), due("b", 0, 9)];
        let ordered = Turns::default().order(waiting, &HashMap::new());
        assert_eq!(names(&ordered), ["a1", "b8", "a2", "b9", "a3"]);
    }

    #[test]
    fn who_runs_least_comes_first_but_priority_before_all() {
        let waiting = vec![due("a", 9, 7), due("a", 0, 1), due("b", 0, 8), due("b", 0, 9)];
        let running = HashMap::from([("a".to_owned(), 1)]);
        let ordered = Turns::default().order(waiting, &running);
        assert_eq!(names(&ordered), ["a7", "b8", "b9", "a1"]);
    }

    #[test]
    fn turns_are_remembered_while_one_runs_at_a_time() {
        let turns = Turns::default();
        let mut waiting =
            vec![due("a", 0, 1), due("a", 0, 2), due("a", 0, 3), due("b", 0, 8), due("b", 0, 9)];
        let mut started = Vec::new();
        while !waiting.is_empty() {
            let first = turns.order(waiting.clone(), &HashMap::new()).remove(0);
            turns.took(&first.tenant);
            waiting.retain(|request| request.uid != first.uid);
            started.push(first);
        }
        assert_eq!(names(&started), ["a1", "b8", "a2", "b9", "a3"]);
    }

    #[test]
    fn who_comes_anew_does_not_make_up_for_the_time_before() {
        let turns = Turns::default();
        (0..100).for_each(|_| turns.took("a"));
        let waiting = vec![due("a", 0, 1), due("a", 0, 2), due("b", 0, 8), due("b", 0, 9)];
        let ordered = turns.order(waiting, &HashMap::from([("b".to_owned(), 0)]));
        assert_eq!(names(&ordered), ["b8", "a1", "b9", "a2"]);
    }
}
