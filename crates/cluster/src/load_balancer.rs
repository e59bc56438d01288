//! Client-side load balancing over the instances of a service.
//!
//! Within a process, a service has one instance, and a call is a function call. Between processes, a call goes
//! to the instance that ranks first for the call's key (rendezvous hashing), or to the instances in turn if it
//! has no key. If that instance is unreachable and the policy of the method (`proto/src/method_policy.rs`) allows it,
//! the call is retried at the next instance, within a retry budget.

use std::{
    convert::Infallible,
    sync::{Arc, atomic::AtomicUsize},
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use http::{Extensions, HeaderMap, HeaderValue, Request, Response, Uri, Version};
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use streamer_core::Uid;
use streamer_proto::method_policy;
use streamer_rpc::{Channel, PREVIOUS_ATTEMPTS};
use tokio::time::timeout;
use tonic::{Code, ConnectError, Status, body::Body};
use tower::{
    Service, ServiceExt,
    retry::budget::{Budget, TpsBudget},
    util::BoxCloneSyncService,
};

use crate::{Instance, Instances};

/// Maximum number of instances to which a call is sent.
const MAX_INSTANCES_PER_CALL: usize = 3;
/// Timeout for receiving a complete request message.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(30);
/// Size of the prefix of a gRPC message.
const FRAME_BYTES: usize = 5;
/// Maximum ratio of retries to calls; ten retries per second are always allowed.
const RETRY_RATIO: f32 = 0.2;

/// UID of the request that a call concerns: calls with the same key go to the same instance while it exists.
#[derive(Clone, Copy, Debug)]
pub struct RouteKey(pub Uid);

impl Instances {
    /// Returns a channel for calls with one request message of at most `max_bytes`, which can be
    /// retried at a different instance.
    #[must_use]
    pub fn channel(&self, max_bytes: usize) -> Channel {
        self.load_balanced(Some(max_bytes))
    }

    /// Returns a channel for calls with streams of request messages, which are never retried.
    #[must_use]
    pub fn streaming_channel(&self) -> Channel {
        self.load_balanced(None)
    }

    fn load_balanced(&self, max_message_bytes: Option<usize>) -> Channel {
        if let Some(local) = self.local_channel() {
            return local.clone();
        }
        Channel::Remote(BoxCloneSyncService::new(LoadBalancer {
            instances: self.clone(),
            round_robin: Arc::default(),
            budget: Arc::new(TpsBudget::new(Duration::from_secs(10), 10, RETRY_RATIO)),
            max_message_bytes,
        }))
    }
}

#[derive(Clone)]
struct LoadBalancer {
    instances: Instances,
    round_robin: Arc<AtomicUsize>,
    budget: Arc<TpsBudget>,
    /// Maximum size of the request message; `None` for streams of messages.
    max_message_bytes: Option<usize>,
}

impl Service<Request<Body>> for LoadBalancer {
    type Response = Response<Body>;
    type Error = Status;
    type Future = BoxFuture<'static, Result<Response<Body>, Status>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Status>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let balancer = self.clone();
        Box::pin(async move {
            match balancer.max_message_bytes {
                Some(max_bytes) => balancer.call_buffered(request, max_bytes).await,
                None => balancer.call_streaming(request).await,
            }
        })
    }
}

impl LoadBalancer {
    fn candidates(&self, extensions: &Extensions) -> Result<Vec<Instance>, Status> {
        let key = extensions.get::<RouteKey>().map(|RouteKey(uid)| *uid);
        let instances = self.instances.ranked(key, &self.round_robin);
        if instances.is_empty() {
            let service = self.instances.service();
            return Err(Status::unavailable(format!("no instance of {service} is known")));
        }
        Ok(instances)
    }

    async fn call_streaming(&self, request: Request<Body>) -> Result<Response<Body>, Status> {
        let instances = self.candidates(request.extensions())?;
        let Some(instance) = instances.into_iter().next() else {
            return Err(Status::unavailable("no healthy instance"));
        };
        let outcome = instance.channel.clone().oneshot(request).await;
        instance.record_reachable(outcome.is_ok());
        outcome
    }

    async fn call_buffered(
        &self,
        request: Request<Body>,
        max_bytes: usize,
    ) -> Result<Response<Body>, Status> {
        let instances = self.candidates(request.extensions())?;
        let (parts, body) = request.into_parts();
        let message = BufferedRequest {
            uri: parts.uri,
            headers: parts.headers,
            extensions: parts.extensions,
            body: read_message(body, max_bytes).await?,
        };
        let policy = method_policy(message.uri.path());
        self.budget.deposit();
        let mut last = None;
        // Number of attempts that may have been executed: transparent retries do not count.
        let mut previous_attempts = 0;
        for (position, instance) in instances.iter().take(MAX_INSTANCES_PER_CALL).enumerate() {
            if position > 0 && !self.budget.withdraw() {
                break;
            }
            let call = instance.channel.clone().oneshot(message.request(previous_attempts));
            let outcome = match policy.timeout {
                Some(limit) => timeout(limit, call)
                    .await
                    .unwrap_or_else(|_| Err(Status::deadline_exceeded("the call timed out"))),
                None => call.await,
            };
            match outcome {
                Ok(response) => {
                    if policy.retry_if_unavailable && is_unavailable(response.headers()) {
                        previous_attempts += 1;
                        last = Some(Ok(response));
                        continue;
                    }
                    instance.record_reachable(true);
                    return Ok(if policy.is_movable_watch() {
                        response.map(|body| instance.end_when_unhealthy(body))
                    } else {
                        response
                    });
                }
                Err(status) => {
                    instance.record_reachable(false);
                    if !is_safe_to_retry(&status) {
                        if !policy.idempotent {
                            return Err(status);
                        }
                        previous_attempts += 1;
                    }
                    last = Some(Err(status));
                }
            }
        }
        last.unwrap_or_else(|| Err(Status::unavailable("no healthy instance")))
    }
}

/// Reads the complete message.
async fn read_message(body: Body, max_bytes: usize) -> Result<Bytes, Status> {
    let whole = Limited::new(body, max_bytes.saturating_add(FRAME_BYTES)).collect();
    match timeout(MESSAGE_TIMEOUT, whole).await {
        Ok(Ok(message)) => Ok(message.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => {
            // The same status as tonic's for a message that exceeds its limit.
            Err(Status::out_of_range(format!("a message must be at most {max_bytes} bytes")))
        }
        Ok(Err(error)) => Err(Status::from_error(error)),
        Err(_) => Err(Status::deadline_exceeded("timed out waiting for the request message")),
    }
}

/// Request that can be retried.
struct BufferedRequest {
    uri: Uri,
    headers: HeaderMap,
    extensions: Extensions,
    body: Bytes,
}

impl BufferedRequest {
    fn request(&self, previous_attempts: usize) -> Request<Body> {
        let body = Full::new(self.body.clone()).map_err(|never: Infallible| match never {});
        let mut request = Request::new(Body::new(body));
        *request.method_mut() = http::Method::POST;
        *request.version_mut() = Version::HTTP_2;
        *request.uri_mut() = self.uri.clone();
        *request.headers_mut() = self.headers.clone();
        *request.extensions_mut() = self.extensions.clone();
        if previous_attempts > 0 {
            request.headers_mut().insert(PREVIOUS_ATTEMPTS, HeaderValue::from(previous_attempts));
        }
        request
    }
}

/// Returns whether a call was not executed: it was not sent, or the peer was shutting down and did not
/// process it. It can then be retried even if it is not idempotent (gRPC calls this a transparent
/// retry).
#[must_use]
pub fn is_safe_to_retry(status: &Status) -> bool {
    let mut source = std::error::Error::source(status);
    while let Some(error) = source {
        let unsent = error.is::<ConnectError>()
            || error.downcast_ref::<hyper::Error>().is_some_and(hyper::Error::is_canceled)
            || error.downcast_ref::<h2::Error>().is_some_and(is_refused);
        if unsent {
            return true;
        }
        source = error.source();
    }
    false
}

/// RFC 9113, section 8.7: refused streams and streams after the last stream of a GOAWAY were not processed.
fn is_refused(error: &h2::Error) -> bool {
    let is_beyond_goaway = error.is_go_away() && error.reason() == Some(h2::Reason::NO_ERROR);
    error.is_remote() && (is_beyond_goaway || error.reason() == Some(h2::Reason::REFUSED_STREAM))
}

/// Returns whether a response is Trailers-Only with UNAVAILABLE.
fn is_unavailable(headers: &HeaderMap) -> bool {
    let unavailable = i32::from(Code::Unavailable).to_string();
    headers.get("grpc-status").is_some_and(|status| status.as_bytes() == unavailable.as_bytes())
}

/// Returns a gRPC request that is routed by the given UID.
pub fn with_route<T>(message: T, uid: Uid) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    request.extensions_mut().insert(RouteKey(uid));
    request
}

#[cfg(test)]
mod tests {
    use std::sync::{Mutex, atomic::Ordering};

    use crate::Service as Callee;
    use tokio::sync::watch;

    use super::*;

    #[tokio::test]
    async fn calls_without_an_instance_are_unavailable() {
        let none = Instances::of(Callee::Router, watch::channel(Arc::default()).1);
        let status = none.channel(1000).oneshot(Request::new(Body::empty())).await.unwrap_err();
        assert_eq!(status.message(), "no instance of router is known");
    }

    /// Returns the number of instances, of two, that receive a call of `path` if each responds with `outcome`.
    async fn tried(path: &'static str, outcome: fn() -> Result<Response<Body>, Status>) -> usize {
        let calls = Arc::new(AtomicUsize::new(0));
        let list = ["a", "b"].map(|name| {
            let calls = calls.clone();
            let channel = BoxCloneSyncService::new(tower::service_fn(move |_: Request<Body>| {
                calls.fetch_add(1, Ordering::Relaxed);
                std::future::ready(outcome())
            }));
            let channel = Channel::Remote(channel);
            Instance::new(name, channel)
        });
        let instances = Instances::of(Callee::Router, watch::channel(list.into()).1);
        let mut request = Request::new(Body::empty());
        *request.uri_mut() = Uri::from_static(path);
        let _ = instances.channel(1000).oneshot(request).await;
        calls.load(Ordering::Relaxed)
    }

    #[tokio::test]
    async fn retries_send_the_number_of_attempts_that_may_have_been_executed() {
        let lost: fn() -> Status = || Status::unknown("the connection was lost");
        let unsent: fn() -> Status = || {
            let mut status = Status::unavailable("cannot connect");
            status.set_source(Arc::new(ConnectError("refused".into())));
            status
        };
        for (outcomes, expected) in [
            ([lost, lost, lost], [None, Some("1"), Some("2")]),
            ([unsent, lost, lost], [None, None, Some("1")]),
            ([lost, unsent, lost], [None, Some("1"), Some("1")]),
        ] {
            let sent = Arc::new(Mutex::new(Vec::new()));
            let list = ["a", "b", "c"].map(|name| {
                let sent = sent.clone();
                let channel = tower::service_fn(move |request: Request<Body>| {
                    let mut sent = sent.lock().unwrap();
                    let outcome = outcomes[sent.len()]();
                    let header = request.headers().get(PREVIOUS_ATTEMPTS);
                    sent.push(header.map(|value| value.to_str().unwrap().to_owned()));
                    std::future::ready(Err::<Response<Body>, _>(outcome))
                });
                Instance::new(name, Channel::Remote(BoxCloneSyncService::new(channel)))
            });
            let instances = Instances::of(Callee::Router, watch::channel(list.into()).1);
            let mut request = Request::new(Body::empty());
            *request.uri_mut() = Uri::from_static("/streamer.router.v1.RouterService/Submit");
            drop(instances.channel(1000).oneshot(request).await);
            let sent = sent.lock().unwrap();
            let sent: Vec<_> = sent.iter().map(Option::as_deref).collect();
            assert_eq!(sent, expected);
        }
    }

    #[tokio::test]
    async fn only_declared_methods_are_retried() {
        let lost = || Err(Status::unknown("the connection was lost"));
        let unavailable = || Ok(Status::unavailable("overloaded").into_http());
        for (path, after_loss, if_unavailable) in [
            ("/streamer.router.v1.RouterService/Get", 2, 2),
            ("/streamer.router.v1.RouterService/Submit", 2, 1),
            ("/streamer.router.v1.RouterService/Redrive", 1, 1),
            ("/other.Service/Get", 1, 1),
        ] {
            assert_eq!(tried(path, lost).await, after_loss, "{path}");
            assert_eq!(tried(path, unavailable).await, if_unavailable, "{path}");
        }
    }
}
