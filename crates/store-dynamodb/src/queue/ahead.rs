//! Counts the requests that precede a request.

use futures_util::future::try_join_all;
use streamer_core::saturate;
use streamer_store::{QueueAhead, RequestRecord, StoreError};

use super::{
    Cursor, MAX_USER_BYTES, action_prefix, first_bytes, first_item, key_after, key_after_prefix,
    priority_prefix, tenant_prefix, user_prefix,
};
use crate::client::Dynamo;

/// Maximum number of tenants whose queues are counted.
const MAX_TENANTS: usize = 16;
/// Maximum number of users of a tenant and priority whose requests are counted.
const MAX_USERS: usize = 16;

impl Dynamo {
    pub(crate) async fn ahead(
        &self,
        record: &RequestRecord,
        limit: usize,
    ) -> Result<QueueAhead, StoreError> {
        let mut ahead = QueueAhead::default();
        let mut cursors = self.cursors(limit);
        let mut from = action_prefix(&record.action);
        for _ in 0..MAX_TENANTS {
            let Some(first) = first_item(&mut cursors, &from).await? else { break };
            if first.action != record.action {
                break;
            }
            let tenant = first.tenant;
            from = key_after_prefix(&tenant_prefix(&record.action, &tenant));
            let own = tenant == record.owner.tenant;
            let left = limit.saturating_sub(saturate::to_usize(ahead.others));
            if left == 0 && !own {
                continue;
            }
            let counts =
                cursors.iter_mut().map(|cursor| count_ahead(cursor, record, &tenant, limit));
            for counted in try_join_all(counts).await? {
                if own {
                    ahead.own += counted.own;
                    ahead.others += counted.others;
                } else {
                    ahead.others += counted.own + counted.others;
                }
            }
            let limit = limit as u64;
            ahead = QueueAhead { own: ahead.own.min(limit), others: ahead.others.min(limit) };
        }
        Ok(ahead)
    }
}

/// Counts the due items of `tenant` for the action of `record` that precede `record` in the queue, each count up to
/// `limit`: in `own`, those with a higher priority, and those of the same user.
async fn count_ahead(
    cursor: &mut Cursor<'_>,
    record: &RequestRecord,
    tenant: &str,
    limit: usize,
) -> Result<QueueAhead, StoreError> {
    let limit = limit as u64;
    let mut ahead = QueueAhead::default();
    let mut from = tenant_prefix(&record.action, tenant);
    let lowest = priority_prefix(&record.action, tenant, record.priority);
    let user = first_bytes(&record.owner.user, MAX_USER_BYTES);
    let own_prefix = user_prefix(&record.action, tenant, record.priority, user);
    let mut skipped_users = 0;
    while let Some(item) = cursor.seek(&from).await? {
        if !item.is_of(&record.action, tenant) || item.priority < record.priority {
            break;
        }
        let is_higher = item.priority > record.priority;
        let is_own = is_higher || item.user == user;
        let count = if is_own { &mut ahead.own } else { &mut ahead.others };
        let is_older =
            is_higher || (item.not_before, item.uid) < (record.not_before.as_millis(), record.uid);
        if is_older && *count < limit {
            *count += 1;
            from = key_after(&item.rank);
        } else if is_higher && *count >= limit {
            from.clone_from(&lowest);
        } else {
            // The rest of the user's requests are not counted.
            skipped_users += 1;
            let of_user = user_prefix(&item.action, tenant, item.priority, &item.user);
            from = key_after_prefix(&of_user);
            if skipped_users >= MAX_USERS || ahead.others >= limit {
                if tenant != record.owner.tenant || from > own_prefix {
                    break;
                }
                from.clone_from(&own_prefix);
            }
        }
    }
    Ok(ahead)
}
