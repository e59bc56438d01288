//! Leases. A processor renews one item, whatever it runs; a request belongs to it until the later of
//! its own lease and its holder's life. What a living holder does not know of any more is given up
//! for it.

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use aws_sdk_dynamodb::{error::ProvideErrorMetadata, types::ReturnConsumedCapacity};
use parking_lot::Mutex;
use streamer_core::Timestamp;
use streamer_store::{Lease, Renewed, RequestRecord, StoreError};

use crate::{
    calls::{number_of, numbers, text_of},
    client::Dynamo,
    error::store_error,
    expression::{Attributes, Expression, key, number, text},
    item::{RequestItem, RequestState, encode},
    requests::{Updated, by_uid},
};

/// What holders are in the fleet table.
pub(crate) const HOLDER: &str = "holder";
/// Holds what its holder has forgotten; never alive.
const NOBODY: &str = "nobody";
const FORGET_AFTER: Duration = Duration::from_secs(3600);
/// A dead holder that had nothing is looked at again after so long, in case clocks differ: who is
/// alive by its own clock need not say so before it claims.
const LOOK_AGAIN: Duration = Duration::from_secs(30);

/// What this process knows of holders.
#[derive(Default)]
pub(crate) struct Holders {
    /// Its own: until when the store says that they live.
    alive_until: Mutex<HashMap<String, Timestamp>>,
    /// Dead ones that had nothing: until when they lived, and when that was seen.
    empty: Mutex<HashMap<String, (i64, Timestamp)>>,
}

impl Holders {
    /// Sees that the holder is there before anything is put under its name.
    pub(crate) async fn register(
        &self,
        dynamo: &Dynamo,
        holder: &str,
        until: Timestamp,
        now: Timestamp,
    ) -> Result<(), StoreError> {
        let known = self.alive_until.lock().get(holder).copied();
        // Not when little is left: others' clocks may be ahead.
        let enough = now.plus(until.since(now) / 2);
        if known.is_some_and(|alive_until| alive_until > enough) {
            return Ok(());
        }
        dynamo.keep_alive(HOLDER, holder, until).await?;
        self.note_alive(holder, until);
        Ok(())
    }

    /// The store says that a holder lives until then.
    pub(crate) fn note_alive(&self, holder: &str, until: Timestamp) {
        self.alive_until.lock().insert(holder.to_owned(), until);
    }

    fn note_empty(&self, holder: &str, alive_until: i64, now: Timestamp) {
        self.empty.lock().insert(holder.to_owned(), (alive_until, now));
    }

    /// Whether a dead holder had nothing lately, and has not been alive since.
    fn is_empty(&self, holder: &str, alive_until: i64, now: Timestamp) -> bool {
        self.empty.lock().get(holder).is_some_and(|(until, seen)| {
            *until == alive_until && now >= *seen && now.since(*seen) < LOOK_AGAIN
        })
    }

    fn keep_only(&self, known: &HashMap<String, i64>) {
        self.empty.lock().retain(|holder, _| known.contains_key(holder));
    }
}

impl Dynamo {
    /// Says in the fleet table that somebody lives until then, if not longer.
    pub(crate) async fn keep_alive(
        &self,
        kind: &str,
        name: &str,
        until: Timestamp,
    ) -> Result<(), StoreError> {
        let update = Expression::default()
            .set("alive_until", number(until.as_millis()))
            .when_or_missing("alive_until", "<", number(until.as_millis()));
        let (doing, key) = ("saying that it lives", key([("kind", kind), ("name", name)]));
        self.update_item(doing, &self.tables.fleet, key, &update).await.map(drop)
    }

    /// All of one kind in the fleet table.
    pub(crate) async fn fleet(&self, kind: &str) -> Result<Vec<Attributes>, StoreError> {
        let mut items = Vec::new();
        let mut start = None;
        loop {
            let page = self
                .client
                .query()
                .table_name(&self.tables.fleet)
                .key_condition_expression("kind = :k")
                .expression_attribute_values(":k", text(kind))
                .consistent_read(true)
                .set_exclusive_start_key(start)
                .return_consumed_capacity(ReturnConsumedCapacity::Total)
                .send()
                .await
                .map_err(|error| store_error("reading the fleet", &error))?;
            self.metrics.note_read(page.consumed_capacity());
            items.extend(page.items.unwrap_or_default());
            start = page.last_evaluated_key;
            if start.is_none() {
                return Ok(items);
            }
        }
    }

    /// Removes somebody from the fleet table, if it has not come back to life.
    pub(crate) async fn forget_member(
        &self,
        kind: &str,
        name: &str,
        alive_until: i64,
    ) -> Result<(), StoreError> {
        let unchanged = Expression::default().when("alive_until", "=", number(alive_until));
        let deleted = self
            .client
            .delete_item()
            .table_name(&self.tables.fleet)
            .set_key(Some(key([("kind", kind), ("name", name)])))
            .set_condition_expression(unchanged.condition())
            .set_expression_attribute_names(unchanged.names())
            .set_expression_attribute_values(unchanged.values())
            .send()
            .await;
        match deleted {
            Ok(_) => Ok(()),
            Err(error) if error.code() == Some("ConditionalCheckFailedException") => Ok(()),
            Err(error) => Err(store_error("forgetting a member of the fleet", &error)),
        }
    }

    /// When the right to run this request's attempt ends.
    pub(crate) async fn lease_end(&self, item: &RequestItem) -> Result<i64, StoreError> {
        let own = item.lease_until.unwrap_or(0);
        let Some(holder) = &item.lease_holder else { return Ok(own) };
        let key = key([("kind", HOLDER), ("name", holder)]);
        let found = self.get_item("reading a lease", &self.tables.fleet, key).await?;
        let alive = match &found {
            Some(item) => number_of(item, "alive_until")?,
            None => 0,
        };
        Ok(own.max(alive))
    }

    pub(crate) async fn renew(
        &self,
        holder: &str,
        leases: &[Lease],
        until: Timestamp,
        now: Timestamp,
    ) -> Result<Vec<Renewed>, StoreError> {
        self.keep_alive(HOLDER, holder, until).await?;
        // Some sixty rows of the index cost as much as one item. What they say of a lease is a little
        // old, and that does no harm; what they do not show may be too new for them.
        let rows = self.rows_of(holder, usize::MAX).await?;
        let mut reasons = HashMap::with_capacity(rows.len());
        for row in &rows {
            let key = (text_of(row, "uid")?, number_of(row, "attempt")?);
            reasons.insert(key, text_of(row, "cancel_reason").ok().map(str::to_owned));
        }
        let names: HashMap<String, i64> =
            leases.iter().map(|lease| (lease.uid.to_string(), i64::from(lease.attempt))).collect();
        let is_shown =
            |(uid, attempt): (&String, &i64)| reasons.contains_key(&(uid.as_str(), *attempt));
        let unseen = names.iter().filter(|name| !is_shown(*name)).map(|(uid, _)| uid.clone());
        let items = by_uid(self.get_many(unseen.collect()).await?);
        let renewed = leases.iter().map(|lease| {
            let uid = lease.uid.to_string();
            if let Some(reason) = reasons.get(&(uid.as_str(), i64::from(lease.attempt))) {
                return Renewed { lease: *lease, held: true, cancel_reason: reason.clone() };
            }
            let item = items.get(&uid);
            let held = item.is_some_and(|item| {
                item.state == RequestState::Running
                    && item.attempt == lease.attempt
                    && item.lease_holder.as_deref() == Some(holder)
            });
            let cancel_reason = item.and_then(|item| item.cancel_reason.clone());
            Renewed { lease: *lease, held, cancel_reason }
        });
        let renewed = renewed.collect();
        let shown = reasons.keys().map(|(uid, _)| (*uid).to_owned());
        let forgotten = shown.filter(|uid| !names.contains_key(uid)).collect();
        self.give_up(holder, forgotten, until, now).await?;
        Ok(renewed)
    }

    /// Gives up what is under this holder's name but not among what it renews: a claim whose answer
    /// it never got, or an attempt that it has left to its worker. It keeps one more lease.
    async fn give_up(
        &self,
        holder: &str,
        forgotten: Vec<String>,
        until: Timestamp,
        now: Timestamp,
    ) -> Result<(), StoreError> {
        for item in self.get_many(forgotten).await? {
            // A claim that is under way is not known to be its own yet.
            let stale = item.lease_until.unwrap_or(0) <= now.as_millis();
            if item.state != RequestState::Running
                || item.lease_holder.as_deref() != Some(holder)
                || !stale
            {
                continue;
            }
            let update = Expression::default()
                .set("lease_holder", text(NOBODY))
                .set("lease_until", number(until.as_millis()))
                .when("state", "=", encode(&RequestState::Running)?)
                .when("attempt", "=", number(item.attempt))
                .when_or_missing("lease_until", "<=", number(now.as_millis()))
                .when("lease_holder", "=", text(holder));
            match self.update_request("giving up a lease", &item.uid, update).await? {
                Updated::Done(_) => tracing::info!(uid = item.uid, holder, "gave up a lease"),
                Updated::Refused(_) => {}
            }
        }
        Ok(())
    }

    /// What runs under this name, as the index shows it.
    async fn rows_of(&self, holder: &str, limit: usize) -> Result<Vec<Attributes>, StoreError> {
        let condition = Expression::default().when("lease_holder", "=", text(holder));
        self.query_index(&self.tables.requests, "running", condition, limit).await
    }

    async fn held_by(&self, holder: &str, limit: usize) -> Result<Vec<String>, StoreError> {
        let rows = self.rows_of(holder, limit).await?;
        rows.iter().map(|row| text_of(row, "uid").map(str::to_owned)).collect()
    }

    pub(crate) async fn expired(
        &self,
        holders: &Holders,
        now: Timestamp,
        limit: usize,
    ) -> Result<Vec<RequestRecord>, StoreError> {
        let fleet = self.fleet(HOLDER).await?;
        let alive = numbers(&fleet, "name", "alive_until");
        let mut dead: Vec<_> =
            alive.iter().filter(|(_, until)| **until <= now.as_millis()).collect();
        self.crowd.note(alive.len() - dead.len());
        holders.keep_only(&alive);
        dead.retain(|(holder, until)| !holders.is_empty(holder, **until, now));
        dead.sort_by_key(|(name, until)| (**until, *name));
        let nobody = (NOBODY.to_owned(), 0);
        let all = dead.into_iter().chain([(&nobody.0, &nobody.1)]);
        let mut found = Vec::new();
        let mut seen = HashSet::new();
        for (holder, until) in all {
            let uids = self.held_by(holder, limit.saturating_mul(2)).await?;
            if uids.is_empty() {
                if holder != NOBODY {
                    holders.note_empty(holder, *until, now);
                }
                let long_dead = now.as_millis().saturating_sub(*until)
                    > i64::try_from(FORGET_AFTER.as_millis()).unwrap_or(i64::MAX);
                if long_dead && holder != NOBODY {
                    self.forget_member(HOLDER, holder, *until).await?;
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
