//! Queue of a tenant for an action: the released requests, by priority and user.

use rusqlite::{Connection, OptionalExtension, params};
use streamer_core::{Timestamp, Uid, saturate};
use streamer_store::{DuePage, DueQuery, DueRequest, QueueKey, RequestRecord};

use crate::row;

/// Maximum number of users of a tenant whose queues are counted.
const MAX_USERS: usize = 16;
/// Number of requests of another tenant to consider for each one to count.
const CONSIDERED_PER_COUNTED: usize = 4;

/// Released requests of a tenant for an action.
pub(super) struct Queue<'a> {
    pub(super) db: &'a Connection,
    pub(super) tenant: &'a str,
    pub(super) action: &'a str,
}

/// Priority and user, in the order of the index: the highest priority first.
type Group = (i32, String);

impl Queue<'_> {
    /// Adds due requests to the page, as [`DueQuery`] describes. Seeks in the index once for each priority and user, so
    /// that no request is read that is not returned.
    pub(super) fn read_due(
        &self,
        limit: usize,
        query: &DueQuery,
        page: &mut DuePage,
    ) -> rusqlite::Result<()> {
        let mut left = limit;
        let mut key =
            (QueueKey { action: self.action.to_owned(), tenant: self.tenant.to_owned() }, i32::MAX);
        let mut is_complete = true;
        let mut next = self.first_group(i32::MAX)?;
        while let Some((priority, first_user)) = next {
            let is_full = left == 0;
            let max_users = if is_full { 1 } else { query.users.max(1) };
            key.1 = priority;
            let after_user = query.after_users.get(&key).map(String::as_str);
            let (users, has_more_users) =
                self.users(priority, &first_user, after_user, max_users)?;
            if has_more_users
                && !is_full
                && let Some(last) = users.last()
            {
                page.next_users.insert(key.clone(), last.clone());
            }
            let each = left.div_ceil(users.len().max(1)).max(1) + query.extra_per_user;
            let mut unfinished = Vec::new();
            for user in users {
                let read = self.read_user((priority, &user), None, each, &mut page.requests)?;
                left = left.saturating_sub(read);
                if read == each {
                    let last = page.requests.last();
                    unfinished.extend(last.map(|last| (user, (last.not_before, last.uid))));
                }
            }
            is_complete &= !has_more_users;
            for (user, last) in unfinished {
                let of_user = (priority, user.as_str());
                let read = self.read_user(of_user, Some(last), left, &mut page.requests)?;
                is_complete &= left > 0 && read < left;
                left -= read;
            }
            next = self.first_group(priority)?;
        }
        if !is_complete {
            page.incomplete.insert(self.tenant.to_owned());
        }
        Ok(())
    }

    /// Returns the highest priority below `below`, and its first user.
    fn first_group(&self, below: i32) -> rusqlite::Result<Option<Group>> {
        self.db
            .prepare_cached(
                "SELECT priority, user FROM requests
                 WHERE state = 0 AND delayed = 0 AND action = ?1 AND tenant = ?2 AND priority < ?3
                 ORDER BY priority DESC, user LIMIT 1",
            )?
            .query_row(params![self.action, self.tenant, below], |row| {
                Ok((row.get(0)?, row.get(1)?))
            })
            .optional()
    }

    /// Returns at most `max` users of a priority, beginning after `after`, and whether there are more.
    fn users(
        &self,
        priority: i32,
        first: &str,
        after: Option<&str>,
        max: usize,
    ) -> rusqlite::Result<(Vec<String>, bool)> {
        let mut next = self.db.prepare_cached(
            "SELECT user FROM requests
             WHERE state = 0 AND delayed = 0 AND action = ?1 AND tenant = ?2 AND priority = ?3 AND user > ?4
             ORDER BY user LIMIT 1",
        )?;
        let mut next = |after: &str| {
            next.query_row(params![self.action, self.tenant, priority, after], |row| row.get(0))
                .optional()
        };
        let begin: Option<String> = match after {
            Some(after) => next(after)?,
            None => None,
        };
        let begin = begin.unwrap_or_else(|| first.to_owned());
        let mut users = vec![begin.clone()];
        let mut last = begin.clone();
        loop {
            let following: Option<String> = next(&last)?;
            let user = following.unwrap_or_else(|| first.to_owned());
            if user == begin {
                return Ok((users, false));
            }
            if users.len() >= max {
                return Ok((users, true));
            }
            last.clone_from(&user);
            users.push(user);
        }
    }

    /// Adds up to `limit` due requests of a user to `due`, oldest first, beginning after the request with the given due
    /// time and UID. Returns their number.
    fn read_user(
        &self,
        (priority, user): (i32, &str),
        after: Option<(Timestamp, Uid)>,
        limit: usize,
        due: &mut Vec<DueRequest>,
    ) -> rusqlite::Result<usize> {
        if limit == 0 {
            return Ok(0);
        }
        let (after, after_uid) = after.map_or((i64::MIN, Vec::new()), |(time, uid)| {
            (time.as_millis(), uid.to_bytes().to_vec())
        });
        let mut statement = self.db.prepare_cached(
            "SELECT uid, not_before FROM requests
             WHERE state = 0 AND delayed = 0 AND action = ?1 AND tenant = ?2 AND priority = ?3 AND user = ?4
                 AND (not_before, uid) > (?5, ?6)
             ORDER BY not_before, uid LIMIT ?7",
        )?;
        let bounds = params![
            self.action,
            self.tenant,
            priority,
            user,
            after,
            after_uid,
            saturate::to_i64(limit)
        ];
        let rows = statement.query_map(bounds, |row| {
            Ok(DueRequest {
                uid: row::uid(row, 0)?,
                action: self.action.to_owned(),
                tenant: self.tenant.to_owned(),
                user: user.to_owned(),
                priority,
                not_before: Timestamp::from_millis(row.get(1)?),
            })
        })?;
        let before = due.len();
        for request in rows {
            due.push(request?);
        }
        Ok(due.len() - before)
    }

    /// Counts the due requests with a higher priority than `record`, up to `limit`.
    pub(super) fn count_higher(
        &self,
        record: &RequestRecord,
        limit: usize,
    ) -> rusqlite::Result<u64> {
        if limit == 0 {
            return Ok(0);
        }
        let counted: i64 = self
            .db
            .prepare_cached(
                "SELECT COUNT(*) FROM (
                     SELECT 1 FROM requests
                     WHERE state = 0 AND delayed = 0 AND action = ?1 AND tenant = ?2 AND priority > ?3
                     LIMIT ?4)",
            )?
            .query_row(
                params![self.action, self.tenant, record.priority, saturate::to_i64(limit)],
                |row| row.get(0),
            )?;
        Ok(saturate::to_u64(counted))
    }

    /// Counts the due requests of another tenant that have a higher priority than `record` or are older, up to `limit`.
    /// Considers a limited number of requests, because newer ones are between them.
    pub(super) fn count_ahead(
        &self,
        record: &RequestRecord,
        limit: usize,
    ) -> rusqlite::Result<u64> {
        let counted: i64 = self
            .db
            .prepare_cached(
                "SELECT COUNT(*) FROM (
                     SELECT priority, not_before, uid FROM requests
                     WHERE state = 0 AND delayed = 0 AND action = ?1 AND tenant = ?2 AND priority >= ?3
                     ORDER BY priority DESC, user LIMIT ?6)
                 WHERE priority > ?3 OR (not_before, uid) < (?4, ?5)",
            )?
            .query_row(
                params![
                    self.action,
                    self.tenant,
                    record.priority,
                    record.not_before.as_millis(),
                    record.uid.to_bytes(),
                    saturate::to_i64(limit.saturating_mul(CONSIDERED_PER_COUNTED))
                ],
                |row| row.get(0),
            )?;
        Ok(saturate::to_u64(counted).min(limit as u64))
    }

    /// Counts the due requests of a user with the same priority as `record` that are older, up to `limit`.
    pub(super) fn count_older(
        &self,
        record: &RequestRecord,
        user: &str,
        limit: usize,
    ) -> rusqlite::Result<u64> {
        if limit == 0 {
            return Ok(0);
        }
        let counted: i64 = self
            .db
            .prepare_cached(
                "SELECT COUNT(*) FROM (
                     SELECT 1 FROM requests
                     WHERE state = 0 AND delayed = 0 AND action = ?1 AND tenant = ?2 AND priority = ?3
                         AND user = ?4 AND (not_before, uid) < (?5, ?6)
                     LIMIT ?7)",
            )?
            .query_row(
                params![
                    self.action,
                    self.tenant,
                    record.priority,
                    user,
                    record.not_before.as_millis(),
                    record.uid.to_bytes(),
                    saturate::to_i64(limit)
                ],
                |row| row.get(0),
            )?;
        Ok(saturate::to_u64(counted))
    }

    /// Returns the first [`MAX_USERS`] users with requests of a priority.
    pub(super) fn users_of(&self, priority: i32) -> rusqlite::Result<Vec<String>> {
        match self.first_group(priority.saturating_add(1))? {
            Some((found, first)) if found == priority => {
                Ok(self.users(priority, &first, None, MAX_USERS)?.0)
            }
            _ => Ok(Vec::new()),
        }
    }
}
