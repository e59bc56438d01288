//! Leases of attempts and their holders. A processor renews a single item, regardless of the number of attempts that it
//! runs: the lease of a request lasts until the later of its own `lease_until` and the `alive_until` of its holder. A
//! lease that a live holder does not renew is released.

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use parking_lot::Mutex;
use streamer_core::{AttemptNumber, RequestState, Timestamp, saturate};
use streamer_store::{Lease, LeaseRenewal, RequestRecord, StoreError};

use crate::{
    client::Dynamo,
    conditional_update::ConditionalUpdate,
    expression::{Attributes, Expression, attempt_number, key, number, text},
    item::{RequestItem, by_uid},
    item_ops::{attempt_of, number_of, numbers_by_name, text_of},
};

/// Kind of lease holders in the fleet table.
pub(crate) const HOLDER: &str = "holder";
/// Name that items store as the holder of a released lease; this holder is never alive.
const NO_HOLDER: &str = "nobody";
/// Time after which a dead holder without leases is removed.
const REMOVE_AFTER: Duration = Duration::from_secs(3600);
/// Time for which a dead holder without leases is skipped. It is then checked again, because clocks may differ: a
/// holder that is alive by its own clock need not renew before it claims.
const RECHECK_INTERVAL: Duration = Duration::from_secs(30);

/// Lease holders that are known to this process.
#[derive(Default)]
pub(crate) struct LeaseHolders {
    /// Time until which the store records each holder of this process as alive.
    alive_until: Mutex<HashMap<String, Timestamp>>,
    /// Dead holders without leases, with their `alive_until` and the time at which they were checked.
    without_leases: Mutex<HashMap<String, (i64, Timestamp)>>,
}

impl LeaseHolders {
    /// Ensures that the holder is recorded as alive before it acquires a lease.
    pub(crate) async fn register(
        &self,
        dynamo: &Dynamo,
        holder: &str,
        until: Timestamp,
        now: Timestamp,
    ) -> Result<(), StoreError> {
        let known = self.alive_until.lock().get(holder).copied();
        // Renews when less than half of the time remains, because other clocks may be ahead.
        let enough = now.plus(until.since(now) / 2);
        if known.is_some_and(|alive_until| alive_until > enough) {
            return Ok(());
        }
        dynamo.renew_member(HOLDER, holder, until).await?;
        self.set_alive(holder, until);
        Ok(())
    }

    /// Sets the time until which the store records the holder as alive.
    pub(crate) fn set_alive(&self, holder: &str, until: Timestamp) {
        self.alive_until.lock().insert(holder.to_owned(), until);
    }

    fn set_without_leases(&self, holder: &str, alive_until: i64, now: Timestamp) {
        self.without_leases.lock().insert(holder.to_owned(), (alive_until, now));
    }

    /// Returns whether a dead holder had no leases when it was recently checked, and has not been alive since.
    fn is_without_leases(&self, holder: &str, alive_until: i64, now: Timestamp) -> bool {
        self.without_leases.lock().get(holder).is_some_and(|(until, seen)| {
            *until == alive_until && now >= *seen && now.since(*seen) < RECHECK_INTERVAL
        })
    }

    fn keep_only(&self, known: &HashMap<String, i64>) {
        self.without_leases.lock().retain(|holder, _| known.contains_key(holder));
    }
}

impl Dynamo {
    /// Records in the fleet table that a member is alive until `until`, unless a later time is already recorded.
    pub(crate) async fn renew_member(
        &self,
        kind: &str,
        name: &str,
        until: Timestamp,
    ) -> Result<(), StoreError> {
        let update = Expression::default()
            .set("alive_until", number(until.as_millis()))
            .when_or_missing("alive_until", "<", number(until.as_millis()));
        let (doing, key) = ("renewing a fleet member", key([("kind", kind), ("name", name)]));
        self.update_item(doing, &self.tables.fleet, key, &update).await.map(drop)
    }

    /// Reads all members of one kind from the fleet table.
    pub(crate) async fn list_members(&self, kind: &str) -> Result<Vec<Attributes>, StoreError> {
        let condition = Expression::default().when("kind", "=", text(kind));
        let mut items = Vec::new();
        let mut start = None;
        loop {
            let query = self
                .query(&self.tables.fleet, None, &condition)
                .consistent_read(true)
                .set_exclusive_start_key(start);
            let page = self.read_page("reading the fleet", query).await?;
            items.extend(page.items.unwrap_or_default());
            start = page.last_evaluated_key;
            if start.is_none() {
                return Ok(items);
            }
        }
    }

    /// Removes a member from the fleet table, unless it was renewed in the meantime.
    pub(crate) async fn remove_member(
        &self,
        kind: &str,
        name: &str,
        alive_until: i64,
    ) -> Result<(), StoreError> {
        let unchanged = Expression::default().when("alive_until", "=", number(alive_until));
        let key = key([("kind", kind), ("name", name)]);
        self.delete_item("removing a fleet member", &self.tables.fleet, key, &unchanged).await
    }

    /// Returns the time at which the lease of the current attempt of a request expires.
    pub(crate) async fn lease_expiry(&self, item: &RequestItem) -> Result<i64, StoreError> {
        let own = item.lease_until.unwrap_or(0);
        let Some(holder) = &item.lease_holder else { return Ok(own) };
        let key = key([("kind", HOLDER), ("name", holder)]);
        let found = self.get_item("reading a lease", &self.tables.fleet, key).await?;
        let alive_until = match &found {
            Some(item) => number_of(item, "alive_until")?,
            None => 0,
        };
        Ok(own.max(alive_until))
    }

    pub(crate) async fn renew(
        &self,
        holder: &str,
        leases: &[Lease],
        until: Timestamp,
        now: Timestamp,
    ) -> Result<Vec<LeaseRenewal>, StoreError> {
        self.renew_member(HOLDER, holder, until).await?;
        // Reading about sixty items of the index costs as much as reading one item of the table. The index is
        // eventually consistent: a stale item is harmless, and a lease without an item may be too new for the index,
        // so the item of the table is read.
        let indexed = self.index_items_of(holder, usize::MAX).await?;
        let mut reasons = HashMap::with_capacity(indexed.len());
        for item in &indexed {
            let key = (text_of(item, "uid")?, attempt_of(item, "attempt")?);
            reasons.insert(key, text_of(item, "cancel_reason").ok().map(str::to_owned));
        }
        let attempts: HashMap<String, AttemptNumber> =
            leases.iter().map(|lease| (lease.uid.to_string(), lease.attempt)).collect();
        let is_indexed = |(uid, attempt): (&String, &AttemptNumber)| {
            reasons.contains_key(&(uid.as_str(), *attempt))
        };
        let unindexed =
            attempts.iter().filter(|attempt| !is_indexed(*attempt)).map(|(uid, _)| uid.clone());
        let items = by_uid(self.get_many(unindexed.collect()).await?);
        let renewed = leases.iter().map(|lease| {
            let uid = lease.uid.to_string();
            if let Some(reason) = reasons.get(&(uid.as_str(), lease.attempt)) {
                return LeaseRenewal { lease: *lease, held: true, cancel_reason: reason.clone() };
            }
            let item = items.get(&uid);
            let held = item.is_some_and(|item| {
                item.state == RequestState::Running
                    && item.attempt == lease.attempt
                    && item.lease_holder.as_deref() == Some(holder)
            });
            let cancel_reason = item.and_then(|item| item.cancel_reason.clone());
            LeaseRenewal { lease: *lease, held, cancel_reason }
        });
        let renewed = renewed.collect();
        let uids = reasons.keys().map(|(uid, _)| (*uid).to_owned());
        let unknown = uids.filter(|uid| !attempts.contains_key(uid)).collect();
        self.release_unknown(holder, unknown, until, now).await?;
        Ok(renewed)
    }

    /// Releases the leases of `holder` that it does not renew: those of a claim whose response was lost, or of an
    /// attempt that the holder left to its worker. Each of these leases lasts for one more period.
    async fn release_unknown(
        &self,
        holder: &str,
        unknown: Vec<String>,
        until: Timestamp,
        now: Timestamp,
    ) -> Result<(), StoreError> {
        for item in self.get_many(unknown).await? {
            // The holder may not yet know of a claim that is in progress.
            let stale = item.lease_until.unwrap_or(0) <= now.as_millis();
            if item.state != RequestState::Running
                || item.lease_holder.as_deref() != Some(holder)
                || !stale
            {
                continue;
            }
            let update = Expression::default()
                .set("lease_holder", text(NO_HOLDER))
                .set("lease_until", number(until.as_millis()))
                .when("state", "=", text(RequestState::Running.as_str()))
                .when("attempt", "=", attempt_number(item.attempt))
                .when_or_missing("lease_until", "<=", number(now.as_millis()))
                .when("lease_holder", "=", text(holder));
            match self.update_request("releasing a lease", &item.uid, update).await? {
                ConditionalUpdate::Applied(_) => {
                    tracing::info!(uid = item.uid, holder, "released a lease");
                }
                ConditionalUpdate::ConditionFailed(_) => {}
            }
        }
        Ok(())
    }

    /// Returns the index items of the running requests of `holder`.
    async fn index_items_of(
        &self,
        holder: &str,
        limit: usize,
    ) -> Result<Vec<Attributes>, StoreError> {
        let condition = Expression::default().when("lease_holder", "=", text(holder));
        self.query_index(&self.tables.requests, "running", condition, limit).await
    }

    async fn held_by(&self, holder: &str, limit: usize) -> Result<Vec<String>, StoreError> {
        let items = self.index_items_of(holder, limit).await?;
        items.iter().map(|item| text_of(item, "uid").map(str::to_owned)).collect()
    }

    pub(crate) async fn requests_with_expired_leases(
        &self,
        holders: &LeaseHolders,
        now: Timestamp,
        limit: usize,
    ) -> Result<Vec<RequestRecord>, StoreError> {
        let members = self.list_members(HOLDER).await?;
        let alive_until = numbers_by_name(&members, "name", "alive_until");
        let mut dead: Vec<_> =
            alive_until.iter().filter(|(_, until)| **until <= now.as_millis()).collect();
        self.claim_jitter.set_processors(alive_until.len() - dead.len());
        holders.keep_only(&alive_until);
        dead.retain(|(holder, until)| !holders.is_without_leases(holder, **until, now));
        dead.sort_by_key(|(name, until)| (**until, *name));
        let no_holder = (NO_HOLDER.to_owned(), 0);
        let all = dead.into_iter().chain([(&no_holder.0, &no_holder.1)]);
        let mut found = Vec::new();
        let mut seen = HashSet::new();
        for (holder, until) in all {
            let uids = self.held_by(holder, limit.saturating_mul(2)).await?;
            if uids.is_empty() {
                if holder != NO_HOLDER {
                    holders.set_without_leases(holder, *until, now);
                }
                let long_dead =
                    now.as_millis().saturating_sub(*until) > saturate::to_millis(REMOVE_AFTER);
                if long_dead && holder != NO_HOLDER {
                    self.remove_member(HOLDER, holder, *until).await?;
                }
                continue;
            }
            for item in self.get_many(uids).await? {
                let own = item.lease_until.unwrap_or(0);
                let ended = own <= now.as_millis()
                    && item.state == RequestState::Running
                    && item.lease_holder.as_deref() == Some(holder.as_str());
                if ended && seen.insert(item.uid.clone()) {
                    found.push((own.max(*until), item));
                }
            }
            if found.len() >= limit {
                break;
            }
        }
        found.sort_by(|one, other| (one.0, &one.1.uid).cmp(&(other.0, &other.1.uid)));
        found.truncate(limit);
        found.iter().map(|(_, item)| item.to_record()).collect()
    }
}
