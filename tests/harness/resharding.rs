//! A DynamoDB proxy that simulates resharding: it splits the only shard of a stream into two, and rejects calls
//! of readers because of expired iterators or trimmed records.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex},
};

use axum::{
    body::{Body, Bytes},
    extract::Request,
    http::{HeaderMap, Uri, header},
    response::Response,
};
use http_body_util::BodyExt;
use serde_json::{Value, json};

use crate::dynamodb_proxy::{self, Handler, Upstream, exception};

const PARENT: &str = "shardId-00000000000000000000-parent";
const CHILDREN: [&str; 2] =
    ["shardId-00000000000000000001-left", "shardId-00000000000000000001-right"];

/// A running proxy.
pub struct Resharding {
    /// URL of the proxy.
    pub endpoint: String,
    inner: Arc<Inner>,
}

struct Inner {
    upstream: Upstream,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    split: bool,
    /// Sequence number of the last record of the parent shard; set once the parent has been read completely.
    parent_end: Option<Option<String>>,
    /// Sequence number of the last record that was read from the parent shard.
    last: Option<String>,
    /// Shards from which a record was read.
    read: BTreeSet<String>,
    /// Exceptions that the next calls return, each with its operation.
    exceptions: Vec<(&'static str, &'static str)>,
}

impl Resharding {
    /// Starts a proxy of the endpoint `target`.
    pub async fn start(target: &str) -> Self {
        let inner = Arc::new(Inner { upstream: Upstream::new(target), state: Mutex::default() });
        Self { endpoint: dynamodb_proxy::start(inner.clone()).await, inner }
    }

    /// Splits the shard.
    ///
    /// # Panics
    /// Panics if a call has panicked.
    pub fn split(&self) {
        self.inner.state.lock().expect("no call panicked").split = true;
    }

    /// Causes the next iterator to expire.
    ///
    /// # Panics
    /// Panics if a call has panicked.
    pub fn expire_iterator(&self) {
        let mut state = self.inner.state.lock().expect("no call panicked");
        state.exceptions.push(("GetRecords", "ExpiredIteratorException"));
    }

    /// Causes the next reader to find its records and its position trimmed.
    ///
    /// # Panics
    /// Panics if a call has panicked.
    pub fn trim_records(&self) {
        let mut state = self.inner.state.lock().expect("no call panicked");
        let error = "TrimmedDataAccessException";
        state.exceptions.extend([("GetRecords", error), ("GetShardIterator", error)]);
    }

    /// Returns whether readers have received all exceptions.
    ///
    /// # Panics
    /// Panics if a call has panicked.
    #[must_use]
    pub fn all_exceptions_returned(&self) -> bool {
        self.inner.state.lock().expect("no call panicked").exceptions.is_empty()
    }

    /// Returns whether a record was read from each shard.
    ///
    /// # Panics
    /// Panics if a call has panicked.
    #[must_use]
    pub fn all_shards_read(&self) -> bool {
        self.inner.state.lock().expect("no call panicked").read.len() == 1 + CHILDREN.len()
    }
}

impl Handler for Inner {
    async fn handle(&self, request: Request) -> Response {
        let target = request.headers().get("x-amz-target").and_then(|value| value.to_str().ok());
        let target = target.unwrap_or_default().to_owned();
        let Some(operation) = target.strip_prefix("DynamoDBStreams_20120810.") else {
            return self.upstream.forward(request).await;
        };
        let (parts, body) = request.into_parts();
        let body = body.collect().await.expect("the message is complete").to_bytes();
        let body: Value = serde_json::from_slice(&body).expect("calls are JSON");
        let call = Call { uri: parts.uri, headers: parts.headers, body };
        match operation {
            "DescribeStream" => self.describe(call).await,
            "GetShardIterator" => self.iterator(call).await,
            "GetRecords" => self.records(call).await,
            _ => panic!("unexpected operation {operation}"),
        }
    }
}

struct Call {
    uri: Uri,
    headers: HeaderMap,
    body: Value,
}

impl Inner {
    fn with_state<T>(&self, action: impl FnOnce(&mut State) -> T) -> T {
        action(&mut self.state.lock().expect("no call panicked"))
    }

    /// Removes the next exception of an operation.
    fn take_exception(&self, operation: &str) -> Option<Response> {
        self.with_state(|state| {
            let at = state.exceptions.iter().position(|(name, _)| *name == operation)?;
            Some(exception(state.exceptions.remove(at).1))
        })
    }

    async fn describe(&self, call: Call) -> Response {
        let mut response = self.forward(call).await;
        let split = self.with_state(|state| state.split);
        let shards = &mut response["StreamDescription"]["Shards"];
        assert_eq!(shards.as_array().map(Vec::len), Some(1), "the upstream stream has one shard");
        let shard = |id: &str, parent: Option<&str>| {
            let mut shard = shards[0].clone();
            shard["ShardId"] = id.into();
            if let Some(parent) = parent {
                shard["ParentShardId"] = parent.into();
            }
            shard
        };
        let mut all = vec![shard(PARENT, None)];
        if split {
            // The children are listed before the parent, that is, out of order.
            all.splice(0..0, CHILDREN.map(|child| shard(child, Some(PARENT))));
        }
        *shards = all.into();
        respond(&response)
    }

    async fn iterator(&self, mut call: Call) -> Response {
        let shard = call.body["ShardId"].as_str().expect("a shard").to_owned();
        let after = call.body["ShardIteratorType"] == "AFTER_SEQUENCE_NUMBER";
        if after && let Some(exception) = self.take_exception("GetShardIterator") {
            return exception;
        }
        if !after && shard != PARENT {
            let parent_end = self.with_state(|state| state.parent_end.clone());
            let last = parent_end.expect("a child is read after its parent");
            if let Some(last) = last {
                call.body["ShardIteratorType"] = "AFTER_SEQUENCE_NUMBER".into();
                call.body["SequenceNumber"] = last.into();
            }
        }
        call.body["ShardId"] = self.upstream_shard(&call).await;
        let mut response = self.forward(call).await;
        tag(&mut response["ShardIterator"], &shard);
        respond(&response)
    }

    async fn records(&self, mut call: Call) -> Response {
        if let Some(exception) = self.take_exception("GetRecords") {
            return exception;
        }
        let iterator = call.body["ShardIterator"].as_str().expect("an iterator").to_owned();
        let (shard, untagged) = iterator.split_once('~').expect("the iterator is tagged");
        call.body["ShardIterator"] = untagged.into();
        // Records that arrive during the call belong to the child shards.
        let ends = shard == PARENT && self.with_state(|state| state.split);
        let mut response = self.forward(call).await;
        let records = response["Records"].as_array_mut().expect("a list of records");
        if let Some(child) = CHILDREN.iter().position(|child| *child == shard) {
            records.retain(|record| child_of(record) == child);
        }
        self.with_state(|state| {
            if !records.is_empty() {
                state.read.insert(shard.to_owned());
            }
            if shard == PARENT {
                let last = records.last().and_then(|record| {
                    record["dynamodb"]["SequenceNumber"].as_str().map(str::to_owned)
                });
                state.last = last.or_else(|| state.last.take());
                if ends {
                    state.parent_end = Some(state.last.clone());
                }
            }
        });
        if ends {
            response["NextShardIterator"] = Value::Null;
        } else {
            tag(&mut response["NextShardIterator"], shard);
        }
        respond(&response)
    }

    async fn upstream_shard(&self, call: &Call) -> Value {
        let mut headers = call.headers.clone();
        let target =
            "DynamoDBStreams_20120810.DescribeStream".parse().expect("the header value is valid");
        headers.insert("x-amz-target", target);
        let body = json!({ "StreamArn": call.body["StreamArn"] });
        let response = self.forward(Call { uri: call.uri.clone(), headers, body }).await;
        response["StreamDescription"]["Shards"][0]["ShardId"].clone()
    }

    /// Forwards a call; panics if the upstream returns an error.
    async fn forward(&self, call: Call) -> Value {
        let mut request = Request::post(call.uri);
        *request.headers_mut().expect("the call is valid") = call.headers;
        let mut request =
            request.body(Body::from(call.body.to_string())).expect("the message is valid");
        request.headers_mut().remove(header::CONTENT_LENGTH);
        let response = self.upstream.forward(request).await;
        let status = response.status();
        let body: Bytes =
            response.into_body().collect().await.expect("the response is complete").to_bytes();
        assert!(status.is_success(), "{}", String::from_utf8_lossy(&body));
        serde_json::from_slice(&body).expect("responses are JSON")
    }
}

/// Returns the index of the child shard to which a record belongs.
fn child_of(record: &Value) -> usize {
    let uid = record["dynamodb"]["Keys"]["uid"]["S"].as_str().expect("the key of a request");
    uid.bytes().map(usize::from).sum::<usize>() % CHILDREN.len()
}

/// Adds the name of a shard to its iterator.
fn tag(iterator: &mut Value, shard: &str) {
    if let Some(untagged) = iterator.as_str() {
        *iterator = format!("{shard}~{untagged}").into();
    }
}

fn respond(body: &Value) -> Response {
    let body = Body::from(body.to_string());
    let response = Response::builder().header(header::CONTENT_TYPE, "application/x-amz-json-1.0");
    response.body(body).expect("the message is valid")
}
