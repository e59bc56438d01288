//! In which order due requests start: highest priority first, then fair between tenants, then
//! oldest first.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, HashMap, VecDeque},
};

use streamer_core::{Timestamp, Uid};
use streamer_store::DueRequest;

/// Orders what the store says is due, tenant by tenant: among equal priorities the tenant with the
/// least running comes first, where `running` counts what runs of each and every request taken
/// here counts as running too.
pub(crate) fn order(due: Vec<DueRequest>, running: &HashMap<String, u32>) -> Vec<DueRequest> {
    let mut ordered = Vec::with_capacity(due.len());
    let mut queues: Vec<(u32, VecDeque<DueRequest>)> = Vec::new();
    for request in due {
        match queues.last_mut() {
            Some((_, queue)) if queue.back().is_some_and(|last| last.tenant == request.tenant) => {
                queue.push_back(request);
            }
            _ => {
                let load = running.get(&request.tenant).copied().unwrap_or(0);
                queues.push((load, VecDeque::from([request])));
            }
        }
    }
    let mut heads: BinaryHeap<Reverse<(Head, usize)>> = queues
        .iter()
        .enumerate()
        .filter_map(|(index, (load, queue))| Some(Reverse((head(*load, queue)?, index))))
        .collect();
    while let Some(Reverse((_, index))) = heads.pop() {
        let (load, queue) = &mut queues[index];
        ordered.extend(queue.pop_front());
        *load += 1;
        if let Some(next) = head(*load, queue) {
            heads.push(Reverse((next, index)));
        }
    }
    ordered
}

/// Least first.
type Head = (Reverse<i32>, u32, Timestamp, Uid);

fn head(load: u32, queue: &VecDeque<DueRequest>) -> Option<Head> {
    let first = queue.front()?;
    Some((Reverse(first.priority), load, first.not_before, first.uid))
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
        assert_eq!(names(&order(waiting, &HashMap::new())), ["a1", "b8", "a2", "b9", "a3"]);
    }

    #[test]
    fn who_runs_least_comes_first_but_priority_before_all() {
        let waiting = vec![due("a", 9, 7), due("a", 0, 1), due("b", 0, 8), due("b", 0, 9)];
        let running = HashMap::from([("a".to_owned(), 1)]);
        assert_eq!(names(&order(waiting, &running)), ["a7", "b8", "b9", "a1"]);
    }
}
