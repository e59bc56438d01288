//! Implementation of the [`Store`] trait.

use std::sync::Arc;

use async_trait::async_trait;
use aws_sdk_dynamodb::{Client, config::Builder};
use streamer_core::{Seq, Timestamp, Uid};
use streamer_store::{
    Adopt, Append, AppendOutcome, CancelOutcome, Claim, ClaimOutcome, ConnectionPage,
    ConnectionRecord, CreateOutcome, DeclaredAction, DeleteOutcome, DuePage, DueQuery, EventPage,
    Lease, LeaseRenewal, ListRequests, NewRequest, Owner, QueueAhead, QueueNotifier, QueueStats,
    ReleasedRequests, RequestPage, RequestRecord, Store, StoreError, StoredPayload, check_appended,
};
use streamer_telemetry::Metrics;
use tokio::time::Instant;

use crate::{
    DynamoOptions, OpenError,
    admission::{Admission, OperationPermit, Purpose},
    client::{Dynamo, DynamoMetrics, TableNames, sdk_config},
    error::store_error,
    expression::{Expression, key},
    large_objects::{LargeObjects, MAX_INLINE_BYTES},
    lease_holders::LeaseHolders,
    queue_counts::QueueCounts,
    spans::CallSpans,
    stream::StreamNotifier,
};

/// Store in DynamoDB.
pub struct DynamoStore {
    dynamo: Dynamo,
    holders: LeaseHolders,
    admission: Admission,
    trigger: Option<Arc<StreamNotifier>>,
}

impl DynamoStore {
    /// Opens the store. The tables must exist (`streamer tables create` creates them); otherwise, the first call, or
    /// [`Store::check`], fails.
    ///
    /// # Errors
    /// Returns an error if the object store cannot be used, or if no AWS region is configured.
    pub async fn open(options: &DynamoOptions, metrics: &Metrics) -> Result<Self, OpenError> {
        let config = sdk_config(options).await?;
        let objects = match &options.objects {
            Some(url) => Some(Arc::new(LargeObjects::open(url, &config)?)),
            None => None,
        };
        let dynamo = Dynamo {
            client: Client::from_conf(Builder::from(&config).interceptor(CallSpans).build()),
            tables: Arc::new(TableNames::new(&options.table_prefix)),
            objects,
            queue_shards: options.queue_shards.clamp(1, 64),
            retention: options.retention,
            claim_jitter: Arc::default(),
            queue_counts: Arc::new(QueueCounts::new(metrics)),
            search_earlier_version_at: Arc::default(),
            metrics: DynamoMetrics::new(metrics),
        };
        let trigger = options.stream.then(|| {
            let client = aws_sdk_dynamodbstreams::Client::new(&config);
            Arc::new(StreamNotifier::new(dynamo.clone(), client))
        });
        let waiting = metrics.gauge(
            "streamer_dynamodb_waiting_operations",
            "Operations that wait for a permit (dynamodb.max_concurrent_operations)",
        );
        let admission = Admission::new(options.max_concurrent_operations, waiting);
        Ok(Self { dynamo, holders: LeaseHolders::default(), admission, trigger })
    }

    /// Returns the maximum size of a payload, result or chunk, in bytes; `None` with an object store.
    #[must_use]
    pub fn max_value_bytes(&self) -> Option<usize> {
        self.dynamo.objects.is_none().then_some(MAX_INLINE_BYTES)
    }

    /// Waits for a permit to run an operation.
    async fn admit(&self, purpose: Purpose) -> Result<OperationPermit<'_>, StoreError> {
        self.record_throttling(self.admission.admit(purpose).await)
    }

    /// Counts the call as throttled if it failed because of overload.
    fn record_throttling<T>(&self, outcome: Result<T, StoreError>) -> Result<T, StoreError> {
        if let Err(StoreError::Overloaded { .. }) = &outcome {
            self.dynamo.metrics.throttled.inc();
        }
        outcome
    }
}

#[async_trait]
impl Store for DynamoStore {
    async fn create_request(&self, new: NewRequest) -> Result<CreateOutcome, StoreError> {
        let _permit = self.admit(Purpose::Caller).await?;
        self.record_throttling(self.dynamo.create(&new).await)
    }

    async fn get_request(&self, uid: Uid) -> Result<Option<RequestRecord>, StoreError> {
        let _permit = self.admit(Purpose::Caller).await?;
        let item = self.record_throttling(self.dynamo.get(&uid.to_string()).await)?;
        item.map(|item| item.to_record()).transpose()
    }

    async fn find_request(
        &self,
        owner: Owner,
        client_id: String,
    ) -> Result<Option<RequestRecord>, StoreError> {
        let _permit = self.admit(Purpose::Caller).await?;
        self.record_throttling(self.dynamo.find(&owner, &client_id).await)
    }

    async fn list_requests(&self, query: ListRequests) -> Result<RequestPage, StoreError> {
        let _permit = self.admit(Purpose::Caller).await?;
        self.record_throttling(self.dynamo.list(&query).await)
    }

    async fn read_payload(&self, uid: Uid) -> Result<Option<StoredPayload>, StoreError> {
        let _permit = self.admit(Purpose::Caller).await?;
        self.record_throttling(self.dynamo.read_payload(uid).await)
    }

    async fn delete_request(&self, uid: Uid) -> Result<DeleteOutcome, StoreError> {
        let _permit = self.admit(Purpose::Caller).await?;
        self.record_throttling(self.dynamo.delete(uid).await)
    }

    async fn claim(&self, mut claim: Claim) -> Result<ClaimOutcome, StoreError> {
        let began = Instant::now();
        let _permit = self.admit(Purpose::Execution).await?;
        // The attempt and its lease start after the wait.
        let waited = began.elapsed();
        claim.now = claim.now.plus(waited);
        claim.lease_until = claim.lease_until.plus(waited);
        let registered =
            self.holders.register(&self.dynamo, &claim.holder, claim.lease_until, claim.now).await;
        self.record_throttling(registered)?;
        self.record_throttling(self.dynamo.claim(&claim).await)
    }

    async fn append(&self, append: Append) -> Result<AppendOutcome, StoreError> {
        check_appended(&append.events)?;
        let _permit = self.admit(Purpose::Execution).await?;
        self.record_throttling(self.dynamo.append(&append).await)
    }

    async fn cancel(
        &self,
        uid: Uid,
        reason: String,
        now: Timestamp,
    ) -> Result<CancelOutcome, StoreError> {
        let _permit = self.admit(Purpose::Caller).await?;
        self.record_throttling(self.dynamo.cancel(uid, &reason, now).await)
    }

    async fn renew_leases(
        &self,
        holder: String,
        leases: Vec<Lease>,
        until: Timestamp,
        now: Timestamp,
    ) -> Result<Vec<LeaseRenewal>, StoreError> {
        // A renewal needs no permit: if it waited for other calls, every attempt that runs in this process could lose
        // its lease.
        let renewed =
            self.record_throttling(self.dynamo.renew(&holder, &leases, until, now).await)?;
        self.holders.set_alive(&holder, until);
        Ok(renewed)
    }

    async fn expired_leases(
        &self,
        now: Timestamp,
        limit: usize,
    ) -> Result<Vec<RequestRecord>, StoreError> {
        let _permit = self.admit(Purpose::Execution).await?;
        self.record_throttling(
            self.dynamo.requests_with_expired_leases(&self.holders, now, limit).await,
        )
    }

    async fn adopt(&self, mut adopt: Adopt) -> Result<Option<RequestRecord>, StoreError> {
        let began = Instant::now();
        let _permit = self.admit(Purpose::Execution).await?;
        let waited = began.elapsed();
        adopt.now = adopt.now.plus(waited);
        adopt.lease_until = adopt.lease_until.plus(waited);
        let registered =
            self.holders.register(&self.dynamo, &adopt.holder, adopt.lease_until, adopt.now).await;
        self.record_throttling(registered)?;
        self.record_throttling(self.dynamo.adopt(&adopt).await)
    }

    async fn overdue_requests(
        &self,
        now: Timestamp,
        limit: usize,
    ) -> Result<Vec<RequestRecord>, StoreError> {
        let _permit = self.admit(Purpose::Execution).await?;
        self.record_throttling(self.dynamo.overdue(now, limit).await)
    }

    async fn due_requests(&self, query: DueQuery) -> Result<DuePage, StoreError> {
        let _permit = self.admit(Purpose::Execution).await?;
        self.record_throttling(self.dynamo.due(&query).await)
    }

    async fn queue_ahead(
        &self,
        record: RequestRecord,
        limit: usize,
    ) -> Result<QueueAhead, StoreError> {
        let _permit = self.admit(Purpose::Caller).await?;
        self.record_throttling(self.dynamo.ahead(&record, limit).await)
    }

    async fn release_delayed(
        &self,
        now: Timestamp,
        limit: usize,
    ) -> Result<ReleasedRequests, StoreError> {
        let _permit = self.admit(Purpose::Execution).await?;
        self.record_throttling(self.dynamo.release_delayed(now, limit).await)
    }

    async fn queue_stats(&self) -> Result<QueueStats, StoreError> {
        let _permit = self.admit(Purpose::Execution).await?;
        self.record_throttling(self.dynamo.stats().await)
    }

    async fn read_events(
        &self,
        uid: Uid,
        after_seq: Seq,
        max_events: usize,
        max_bytes: usize,
    ) -> Result<EventPage, StoreError> {
        let _permit = self.admit(Purpose::Caller).await?;
        self.record_throttling(self.dynamo.read_events(uid, after_seq, max_events, max_bytes).await)
    }

    async fn update_connections(
        &self,
        opened: Vec<ConnectionRecord>,
        closed: Vec<Uid>,
    ) -> Result<(), StoreError> {
        let _permit = self.admit(Purpose::Caller).await?;
        self.record_throttling(self.dynamo.update_connections(opened, closed).await)
    }

    async fn renew_gateway(&self, gateway: String, until: Timestamp) -> Result<(), StoreError> {
        self.record_throttling(self.dynamo.renew_gateway(&gateway, until).await)
    }

    async fn list_connections(
        &self,
        tenant: String,
        user: Option<String>,
        after: Option<Uid>,
        limit: usize,
        now: Timestamp,
    ) -> Result<ConnectionPage, StoreError> {
        let listed = self.dynamo.list_connections(&tenant, user.as_deref(), after, limit, now);
        let _permit = self.admit(Purpose::Caller).await?;
        self.record_throttling(listed.await)
    }

    async fn save_actions(
        &self,
        actions: Vec<DeclaredAction>,
        now: Timestamp,
    ) -> Result<(), StoreError> {
        let _permit = self.admit(Purpose::Caller).await?;
        self.record_throttling(self.dynamo.save_actions(&actions, now).await)
    }

    async fn list_actions(&self, since: Timestamp) -> Result<Vec<DeclaredAction>, StoreError> {
        let _permit = self.admit(Purpose::Caller).await?;
        self.record_throttling(self.dynamo.list_actions(since).await)
    }

    fn queue_notifier(&self) -> Option<Arc<dyn QueueNotifier>> {
        self.trigger.clone().map(|trigger| trigger as Arc<dyn QueueNotifier>)
    }

    async fn check(&self) -> Result<(), StoreError> {
        let count = Expression::default().add("checks", 1);
        let checked = self
            .dynamo
            .client
            .update_item()
            .table_name(&self.dynamo.tables.fleet)
            .set_key(Some(key([("kind", "health"), ("name", "check")])))
            .set_update_expression(count.update())
            .set_expression_attribute_names(count.names())
            .set_expression_attribute_values(count.values())
            .send()
            .await;
        checked.map(drop).map_err(|error| store_error("checking the store", &error))
    }
}
