//! A DynamoDB whose stream has more than one shard: in front of a real one, whose stream has one, it
//! ends that shard where it is told to and goes on in two others, and forgets where readers were.

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

use crate::front::{self, Answer, Upstream, exception};

const PARENT: &str = "shardId-00000000000000000000-parent";
const CHILDREN: [&str; 2] =
    ["shardId-00000000000000000001-left", "shardId-00000000000000000001-right"];

/// A running one.
pub struct Resharding {
    /// Where it is asked.
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
    /// The last record of the parent, once it has been read to its end.
    parent_ended: Option<Option<String>>,
    /// The last record of the parent so far.
    last: Option<String>,
    /// Shards that a record was read from.
    read: BTreeSet<String>,
    /// What the next calls answer, by operation.
    exceptions: Vec<(&'static str, &'static str)>,
}

impl Resharding {
    /// Starts one in front of this endpoint.
    pub async fn start(target: &str) -> Self {
        let inner = Arc::new(Inner { upstream: Upstream::new(target), state: Mutex::default() });
        Self { endpoint: front::start(inner.clone()).await, inner }
    }

    /// The shard is split.
    ///
    /// # Panics
    /// When a call has panicked.
    pub fn split(&self) {
        self.inner.state.lock().expect("no call panicked").split = true;
    }

    /// The next iterator that is used has expired.
    ///
    /// # Panics
    /// When a call has panicked.
    pub fn expire(&self) {
        let mut state = self.inner.state.lock().expect("no call panicked");
        state.exceptions.push(("GetRecords", "ExpiredIteratorException"));
    }

    /// What the next reader asks for has been removed, and so has the place where it was.
    ///
    /// # Panics
    /// When a call has panicked.
    pub fn trim(&self) {
        let mut state = self.inner.state.lock().expect("no call panicked");
        let error = "TrimmedDataAccessException";
        state.exceptions.extend([("GetRecords", error), ("GetShardIterator", error)]);
    }

    /// Whether readers have met everything that they were to meet.
    ///
    /// # Panics
    /// When a call has panicked.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.inner.state.lock().expect("no call panicked").exceptions.is_empty()
    }

    /// Whether a record was read from each shard.
    ///
    /// # Panics
    /// When a call has panicked.
    #[must_use]
    pub fn all_read(&self) -> bool {
        self.inner.state.lock().expect("no call panicked").read.len() == 1 + CHILDREN.len()
    }
}

impl Answer for Inner {
    async fn answer(&self, request: Request) -> Response {
        let target = request.headers().get("x-amz-target").and_then(|value| value.to_str().ok());
        let target = target.unwrap_or_default().to_owned();
        let Some(operation) = target.strip_prefix("DynamoDBStreams_20120810.") else {
            return self.upstream.forward(request).await;
        };
        let (parts, body) = request.into_parts();
        let body = body.collect().await.expect("a message comes whole").to_bytes();
        let body: Value = serde_json::from_slice(&body).expect("calls are JSON");
        let call = Call { uri: parts.uri, headers: parts.headers, body };
        match operation {
            "DescribeStream" => self.describe(call).await,
            "GetShardIterator" => self.iterator(call).await,
            "GetRecords" => self.records(call).await,
            _ => panic!("nobody should call {operation}"),
        }
    }
}

struct Call {
    uri: Uri,
    headers: HeaderMap,
    body: Value,
}

impl Inner {
    fn with<T>(&self, what: impl FnOnce(&mut State) -> T) -> T {
        what(&mut self.state.lock().expect("no call panicked"))
    }

    fn exception(&self, operation: &str) -> Option<Response> {
        self.with(|state| {
            let at = state.exceptions.iter().position(|(of, _)| *of == operation)?;
            Some(exception(state.exceptions.remove(at).1))
        })
    }

    async fn describe(&self, call: Call) -> Response {
        let mut answer = self.ask(call).await;
        let split = self.with(|state| state.split);
        let shards = &mut answer["StreamDescription"]["Shards"];
        assert_eq!(shards.as_array().map(Vec::len), Some(1), "the real one has one shard");
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
            // In no order.
            all.splice(0..0, CHILDREN.map(|child| shard(child, Some(PARENT))));
        }
        *shards = all.into();
        respond(&answer)
    }

    async fn iterator(&self, mut call: Call) -> Response {
        let shard = call.body["ShardId"].as_str().expect("a shard").to_owned();
        let after = call.body["ShardIteratorType"] == "AFTER_SEQUENCE_NUMBER";
        if after && let Some(exception) = self.exception("GetShardIterator") {
            return exception;
        }
        if !after && shard != PARENT {
            let ended = self.with(|state| state.parent_ended.clone());
            let last = ended.expect("a shard is read after the one that it comes from");
            if let Some(last) = last {
                call.body["ShardIteratorType"] = "AFTER_SEQUENCE_NUMBER".into();
                call.body["SequenceNumber"] = last.into();
            }
        }
        call.body["ShardId"] = self.real_shard(&call).await;
        let mut answer = self.ask(call).await;
        mark(&mut answer["ShardIterator"], &shard);
        respond(&answer)
    }

    async fn records(&self, mut call: Call) -> Response {
        if let Some(exception) = self.exception("GetRecords") {
            return exception;
        }
        let iterator = call.body["ShardIterator"].as_str().expect("an iterator").to_owned();
        let (shard, real) = iterator.split_once('~').expect("it is one of ours");
        call.body["ShardIterator"] = real.into();
        // What comes while the call is under way belongs to the children.
        let ends = shard == PARENT && self.with(|state| state.split);
        let mut answer = self.ask(call).await;
        let records = answer["Records"].as_array_mut().expect("there are records");
        if let Some(side) = CHILDREN.iter().position(|child| *child == shard) {
            records.retain(|record| side_of(record) == side);
        }
        self.with(|state| {
            if !records.is_empty() {
                state.read.insert(shard.to_owned());
            }
            if shard == PARENT {
                let last = records.last().and_then(|record| {
                    record["dynamodb"]["SequenceNumber"].as_str().map(str::to_owned)
                });
                state.last = last.or_else(|| state.last.take());
                if ends {
                    state.parent_ended = Some(state.last.clone());
                }
            }
        });
        if ends {
            answer["NextShardIterator"] = Value::Null;
        } else {
            mark(&mut answer["NextShardIterator"], shard);
        }
        respond(&answer)
    }

    async fn real_shard(&self, call: &Call) -> Value {
        let mut headers = call.headers.clone();
        let target = "DynamoDBStreams_20120810.DescribeStream".parse().expect("a value");
        headers.insert("x-amz-target", target);
        let body = json!({ "StreamArn": call.body["StreamArn"] });
        let answer = self.ask(Call { uri: call.uri.clone(), headers, body }).await;
        answer["StreamDescription"]["Shards"][0]["ShardId"].clone()
    }

    /// The answer of the real one, which must be no error.
    async fn ask(&self, call: Call) -> Value {
        let mut request = Request::post(call.uri);
        *request.headers_mut().expect("the call is right") = call.headers;
        let mut request = request.body(Body::from(call.body.to_string())).expect("it is right");
        request.headers_mut().remove(header::CONTENT_LENGTH);
        let response = self.upstream.forward(request).await;
        let status = response.status();
        let body: Bytes = response.into_body().collect().await.expect("it comes whole").to_bytes();
        assert!(status.is_success(), "{}", String::from_utf8_lossy(&body));
        serde_json::from_slice(&body).expect("answers are JSON")
    }
}

/// Which of the children a record is in.
fn side_of(record: &Value) -> usize {
    let uid = record["dynamodb"]["Keys"]["uid"]["S"].as_str().expect("the key of a request");
    uid.bytes().map(usize::from).sum::<usize>() % CHILDREN.len()
}

/// Notes in an iterator which shard it is of.
fn mark(iterator: &mut Value, shard: &str) {
    if let Some(real) = iterator.as_str() {
        *iterator = format!("{shard}~{real}").into();
    }
}

fn respond(answer: &Value) -> Response {
    let body = Body::from(answer.to_string());
    let response = Response::builder().header(header::CONTENT_TYPE, "application/x-amz-json-1.0");
    response.body(body).expect("it is right")
}
