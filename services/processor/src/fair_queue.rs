//! Orders due requests: by priority, then fairly among tenants, then by age, oldest first.
//!
//! Tenants with fewer running attempts come first. Start-time fair queueing breaks ties: each start costs 1.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, HashMap, VecDeque},
};

use parking_lot::Mutex;
use streamer_core::{FairTags, Timestamp, Uid};
use streamer_store::DueRequest;

/// Start-time fair queue of tenants.
#[derive(Debug, Default)]
pub(crate) struct FairQueue {
    tags: Mutex<FairTags<u64>>,
}

impl FairQueue {
    /// Charges a tenant for the start of a request.
    pub(crate) fn charge(&self, tenant: &str) {
        let mut tags = self.tags.lock();
        let tag = tags.start_tag(tenant);
        tags.start(tag);
        tags.finish(&tenant.into(), tag + 1);
    }

    /// Orders due requests, which must be grouped by tenant. `running` contains the number of running attempts of each
    /// tenant; an ordered request counts as a running attempt.
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

    fn queues(&self, due: Vec<DueRequest>, running: &HashMap<String, u32>) -> Vec<TenantQueue> {
        let tags = self.tags.lock();
        let mut queues: Vec<TenantQueue> = Vec::new();
        for request in due {
            match queues.last_mut() {
                Some(queue) if queue.is_for(&request.tenant) => queue.requests.push_back(request),
                _ => queues.push(TenantQueue {
                    load: running.get(&request.tenant).copied().unwrap_or(0),
                    tag: tags.start_tag(&request.tenant),
                    requests: VecDeque::from([request]),
                }),
            }
        }
        queues
    }
}

/// Due requests of one tenant.
struct TenantQueue {
    load: u32,
    tag: u64,
    requests: VecDeque<DueRequest>,
}

/// Sort key of the first request of a tenant; the lowest key is first.
type Head = (Reverse<i32>, u32, u64, Timestamp, Uid);

impl TenantQueue {
    fn is_for(&self, tenant: &str) -> bool {
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
    fn tenants_alternate_and_the_oldest_request_of_each_is_first() {
        let waiting =
            vec![due("a", 0, 1), due("a", 0, 2), due("a", 0, 3), due("b", 0, 8), due("b", 0, 9)];
        let ordered = FairQueue::default().order(waiting, &HashMap::new());
        assert_eq!(names(&ordered), ["a1", "b8", "a2", "b9", "a3"]);
    }

    #[test]
    fn priority_precedes_the_least_running_tenant() {
        let waiting = vec![due("a", 9, 7), due("a", 0, 1), due("b", 0, 8), due("b", 0, 9)];
        let running = HashMap::from([("a".to_owned(), 1)]);
        let ordered = FairQueue::default().order(waiting, &running);
        assert_eq!(names(&ordered), ["a7", "b8", "b9", "a1"]);
    }

    #[test]
    fn tenants_alternate_across_separate_scans() {
        let queue = FairQueue::default();
        let mut waiting =
            vec![due("a", 0, 1), due("a", 0, 2), due("a", 0, 3), due("b", 0, 8), due("b", 0, 9)];
        let mut started = Vec::new();
        while !waiting.is_empty() {
            let first = queue.order(waiting.clone(), &HashMap::new()).remove(0);
            queue.charge(&first.tenant);
            waiting.retain(|request| request.uid != first.uid);
            started.push(first);
        }
        assert_eq!(names(&started), ["a1", "b8", "a2", "b9", "a3"]);
    }

    #[test]
    fn a_new_tenant_gets_no_credit_for_idle_time() {
        let queue = FairQueue::default();
        (0..100).for_each(|_| queue.charge("a"));
        let waiting = vec![due("a", 0, 1), due("a", 0, 2), due("b", 0, 8), due("b", 0, 9)];
        let ordered = queue.order(waiting, &HashMap::from([("b".to_owned(), 0)]));
        assert_eq!(names(&ordered), ["b8", "a1", "b9", "a2"]);
    }
}
