//! Every instance of a service, and calls that find one that answers.
//!
//! In one process there is one member and a call is a function call. Between processes a call goes
//! to the member that the request's key ranks first (rendezvous hash), or else to each in turn;
//! when it cannot be reached, and a repeat is safe, to the next one, within a budget.

use std::{
    convert::Infallible,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use http::{Extensions, HeaderMap, HeaderValue, Request, Response, Uri, Version};
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use streamer_core::Uid;
use tokio::{sync::watch, time::timeout};
use tonic::{Code, ConnectError, Status, body::Body};
use tower::{
    Service, ServiceExt,
    retry::budget::{Budget, TpsBudget},
    util::BoxCloneSyncService,
};

use crate::{Channel, REPEATED, ended_body::end_when};

/// Members that one call is tried at, at most.
const MAX_TRIES: usize = 3;
/// A call between services that is no stream must be answered within this.
const INTERNAL_TIMEOUT: Duration = Duration::from_secs(5);
/// So must a public one that reads or writes one thing.
const SHORT_TIMEOUT: Duration = Duration::from_secs(10);
/// A message must have come whole within this.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(30);
/// gRPC's five bytes in front of a message.
const FRAME_BYTES: usize = 5;
/// Repeats may be so much of all calls, and in any case ten a second.
const RETRY_SHARE: f32 = 0.2;

/// Which request a call is about: the same key goes to the same member, as long as it is there.
#[derive(Clone, Copy, Debug)]
pub struct RouteKey(pub Uid);

/// One instance of a service.
#[derive(Clone)]
pub struct Member {
    /// How it is told from the others: its address.
    pub name: Arc<str>,
    /// To it.
    pub channel: Channel,
    down: Arc<AtomicBool>,
    /// Whether it may serve watches.
    healthy: Arc<watch::Sender<bool>>,
}

impl Member {
    /// A member that this channel leads to.
    #[must_use]
    pub fn new(name: &str, channel: Channel) -> Self {
        let healthy = Arc::new(watch::Sender::new(true));
        Self { name: name.into(), channel, down: Arc::default(), healthy }
    }

    /// Whether it could be reached last time. Whoever keeps the list asks again those that could not.
    #[must_use]
    pub fn seems_up(&self) -> bool {
        !self.down.load(Ordering::Relaxed)
    }

    /// Remembers whether it could be reached.
    pub fn note(&self, reached: bool) {
        self.down.store(!reached, Ordering::Relaxed);
    }

    /// Sets whether it may serve watches. If not, those that it serves end with UNAVAILABLE, so that they
    /// continue at another member.
    pub fn set_healthy(&self, healthy: bool) {
        self.healthy.send_if_modified(|known| std::mem::replace(known, healthy) != healthy);
    }

    /// To it, for watches: they end when it fails.
    #[must_use]
    pub fn watch_channel(&self) -> Channel {
        let member = self.clone();
        BoxCloneSyncService::new(tower::service_fn(move |request: Request<Body>| {
            let member = member.clone();
            async move {
                let response = member.channel.clone().oneshot(request).await?;
                Ok(response.map(|body| member.guarded(body)))
            }
        }))
    }

    fn guarded(&self, body: Body) -> Body {
        let fails = self.fails();
        end_when(body, async move {
            fails.await;
            Status::unavailable("the instance that served this watch is down; watch again")
        })
    }

    /// Returns once it may not serve watches.
    fn fails(&self) -> impl Future<Output = ()> + Send + 'static {
        let mut healthy = self.healthy.subscribe();
        async move {
            if healthy.wait_for(|healthy| !healthy).await.is_err() {
                // It left the list and is not probed; the end of its connection ends the watch.
                std::future::pending::<()>().await;
            }
        }
    }

    /// Its weight for a key: the same in every process.
    fn weight(&self, key: Uid) -> u64 {
        let mut hash = 0xcbf2_9ce4_8422_2325_u64;
        for byte in self.name.bytes() {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
        // Finalizer of SplitMix64: spreads every bit over all.
        let mut mixed = hash ^ key.spread();
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}

/// All instances of a service that are known at present.
#[derive(Clone)]
pub struct Members {
    list: watch::Receiver<Arc<[Member]>>,
    /// The only one, in this process.
    local: Option<Channel>,
    service: &'static str,
}

impl Members {
    /// The one in this process.
    #[must_use]
    pub fn one(service: &'static str, channel: Channel) -> Self {
        let list: Arc<[Member]> = Arc::new([Member::new("local", channel.clone())]);
        Self { list: watch::channel(list).1, local: Some(channel), service }
    }

    /// Those of a list that changes.
    #[must_use]
    pub fn of(service: &'static str, list: watch::Receiver<Arc<[Member]>>) -> Self {
        Self { list, local: None, service }
    }

    /// Whether it is the one in this process.
    #[must_use]
    pub fn is_local(&self) -> bool {
        self.local.is_some()
    }

    /// What they are.
    #[must_use]
    pub fn service(&self) -> &'static str {
        self.service
    }

    /// Those that are known now.
    #[must_use]
    pub fn all(&self) -> Arc<[Member]> {
        self.list.borrow().clone()
    }

    /// Waits until others are known; for ever when that cannot be.
    pub async fn changed(&mut self) {
        if self.list.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// The one that the key ranks first, whether it can be reached or not.
    #[must_use]
    pub fn owner(&self, key: Uid) -> Option<Member> {
        self.all().iter().max_by_key(|member| member.weight(key)).cloned()
    }

    /// Calls with one message each, of at most so many bytes, which can be repeated elsewhere.
    #[must_use]
    pub fn channel(&self, max_bytes: usize) -> Channel {
        self.balanced(Some(max_bytes))
    }

    /// Calls with streams of messages, which go to one member only.
    #[must_use]
    pub fn streaming_channel(&self) -> Channel {
        self.balanced(None)
    }

    fn balanced(&self, buffered: Option<usize>) -> Channel {
        if let Some(local) = &self.local {
            return local.clone();
        }
        BoxCloneSyncService::new(Balanced {
            members: self.clone(),
            turn: Arc::default(),
            budget: Arc::new(TpsBudget::new(Duration::from_secs(10), 10, RETRY_SHARE)),
            buffered,
        })
    }

    /// In the order in which they should be tried.
    fn in_order(&self, key: Option<RouteKey>, turn: &AtomicUsize) -> Vec<Member> {
        let mut members = self.all().to_vec();
        match key {
            Some(RouteKey(key)) => {
                members.sort_by_key(|member| std::cmp::Reverse(member.weight(key)));
            }
            None if !members.is_empty() => {
                let turn = turn.fetch_add(1, Ordering::Relaxed) % members.len();
                members.rotate_left(turn);
            }
            None => {}
        }
        // Those that seem down come last, in the same order.
        members.sort_by_key(|member| !member.seems_up());
        members
    }
}

#[derive(Clone)]
struct Balanced {
    members: Members,
    turn: Arc<AtomicUsize>,
    budget: Arc<TpsBudget>,
    /// The largest message, of calls with one.
    buffered: Option<usize>,
}

impl Service<Request<Body>> for Balanced {
    type Response = Response<Body>;
    type Error = Status;
    type Future = BoxFuture<'static, Result<Response<Body>, Status>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Status>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let balanced = self.clone();
        Box::pin(async move {
            match balanced.buffered {
                Some(max_bytes) => balanced.call_buffered(request, max_bytes).await,
                None => balanced.call_streaming(request).await,
            }
        })
    }
}

impl Balanced {
    fn order(&self, extensions: &Extensions) -> Result<Vec<Member>, Status> {
        let key = extensions.get::<RouteKey>().copied();
        let members = self.members.in_order(key, &self.turn);
        if members.is_empty() {
            return Err(Status::unavailable(format!("no {} is known", self.members.service)));
        }
        Ok(members)
    }

    async fn call_streaming(&self, request: Request<Body>) -> Result<Response<Body>, Status> {
        let members = self.order(request.extensions())?;
        let Some(member) = members.into_iter().next() else {
            return Err(Status::unavailable("nobody is there"));
        };
        let outcome = member.channel.clone().oneshot(request).await;
        member.note(outcome.is_ok());
        outcome
    }

    async fn call_buffered(
        &self,
        request: Request<Body>,
        max_bytes: usize,
    ) -> Result<Response<Body>, Status> {
        let members = self.order(request.extensions())?;
        let (parts, body) = request.into_parts();
        let message = Message {
            uri: parts.uri,
            headers: parts.headers,
            extensions: parts.extensions,
            body: keep(body, max_bytes).await?,
        };
        let policy = Policy::of(message.uri.path());
        self.budget.deposit();
        let mut last = None;
        for (position, member) in members.iter().take(MAX_TRIES).enumerate() {
            if position > 0 && !self.budget.withdraw() {
                break;
            }
            let call = member.channel.clone().oneshot(message.request(position > 0));
            let outcome = match policy.timeout {
                Some(limit) => timeout(limit, call)
                    .await
                    .unwrap_or_else(|_| Err(Status::deadline_exceeded("it took too long"))),
                None => call.await,
            };
            match outcome {
                Ok(response) => {
                    if policy.ask_another && is_unavailable(response.headers()) {
                        last = Some(Ok(response));
                        continue;
                    }
                    member.note(true);
                    return Ok(if policy.is_watch {
                        response.map(|body| member.guarded(body))
                    } else {
                        response
                    });
                }
                Err(status) => {
                    let unsent = is_unsent(&status);
                    member.note(false);
                    if !unsent && !policy.repeatable {
                        return Err(status);
                    }
                    last = Some(Err(status));
                }
            }
        }
        last.unwrap_or_else(|| Err(Status::unavailable("nobody is there")))
    }
}

/// The whole message.
async fn keep(body: Body, max_bytes: usize) -> Result<Bytes, Status> {
    let whole = Limited::new(body, max_bytes.saturating_add(FRAME_BYTES)).collect();
    match timeout(MESSAGE_TIMEOUT, whole).await {
        Ok(Ok(message)) => Ok(message.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => {
            Err(Status::out_of_range(format!("a message must be at most {max_bytes} bytes")))
        }
        Ok(Err(error)) => Err(Status::from_error(error)),
        Err(_) => Err(Status::deadline_exceeded("the message did not come in time")),
    }
}

/// A request that can be sent again.
struct Message {
    uri: Uri,
    headers: HeaderMap,
    extensions: Extensions,
    body: Bytes,
}

impl Message {
    fn request(&self, repeat: bool) -> Request<Body> {
        let body = Full::new(self.body.clone()).map_err(|never: Infallible| match never {});
        let mut request = Request::new(Body::new(body));
        *request.method_mut() = http::Method::POST;
        *request.version_mut() = Version::HTTP_2;
        *request.uri_mut() = self.uri.clone();
        *request.headers_mut() = self.headers.clone();
        *request.extensions_mut() = self.extensions.clone();
        if repeat {
            request.headers_mut().insert(REPEATED, HeaderValue::from_static("1"));
        }
        request
    }
}

/// What may be done with a call by its name.
struct Policy {
    /// A repeat does no harm, even when the first one arrived and nobody knows what became of it.
    repeatable: bool,
    /// Another member may be asked when one has answered that it cannot.
    ask_another: bool,
    /// Its answer lasts for as long as a request runs, and can be asked for again at another member. A
    /// submission cannot: its first message says what was stored.
    is_watch: bool,
    timeout: Option<Duration>,
}

impl Policy {
    fn of(path: &str) -> Self {
        let method = path.rsplit('/').next().unwrap_or_default();
        // These do something anew each time.
        let once = ["Execute", "Redrive", "RedriveMany", "Send", "Broadcast"];
        // A submission says which request it is; but what it asks for may have been run and not
        // been stored.
        let submissions = ["Submit", "SubmitAndWatch"];
        let short = ["Get", "List", "ListEvents", "ListActions", "Cancel", "GetOperation"];
        let internal = ["Publish", "Announce", "Wake", "SignalCancel"];
        let is_one_of = |names: &[&str]| names.contains(&method);
        Self {
            repeatable: !is_one_of(&once),
            ask_another: !is_one_of(&once) && !is_one_of(&submissions),
            is_watch: method == "Watch",
            timeout: if is_one_of(&internal) {
                Some(INTERNAL_TIMEOUT)
            } else {
                is_one_of(&short).then_some(SHORT_TIMEOUT)
            },
        }
    }
}

/// Whether nobody has begun to do what a call asks for: it was not sent, or the peer was about to go
/// and has not taken it in. Then it can be made anew, whatever it does (what gRPC calls a
/// transparent retry).
#[must_use]
pub fn is_unsent(status: &Status) -> bool {
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

/// RFC 9113, 8.7: streams that were refused, or that GOAWAY leaves out, have not been processed.
fn is_refused(error: &h2::Error) -> bool {
    let leaves_out = error.is_go_away() && error.reason() == Some(h2::Reason::NO_ERROR);
    error.is_remote() && (leaves_out || error.reason() == Some(h2::Reason::REFUSED_STREAM))
}

/// An answer that says nothing but that somebody else should be asked.
fn is_unavailable(headers: &HeaderMap) -> bool {
    let unavailable = i32::from(Code::Unavailable).to_string();
    headers.get("grpc-status").is_some_and(|status| status.as_bytes() == unavailable.as_bytes())
}

/// A call about this request.
pub fn with_route<T>(message: T, uid: Uid) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    request.extensions_mut().insert(RouteKey(uid));
    request
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use streamer_core::Timestamp;

    use super::*;

    fn members(names: &[&str]) -> Members {
        let channel = || {
            BoxCloneSyncService::new(tower::service_fn(|_: Request<Body>| async {
                Err(Status::unimplemented("in tests"))
            }))
        };
        let list: Vec<_> = names.iter().map(|name| Member::new(name, channel())).collect();
        Members::of("test", watch::channel(list.into()).1)
    }

    #[test]
    fn keys_are_spread_evenly_and_stay_when_others_leave() {
        let three = members(&["10.0.0.1:80", "10.0.0.2:80", "10.0.0.3:80"]);
        let two = members(&["10.0.0.1:80", "10.0.0.3:80"]);
        let mut counts: HashMap<Arc<str>, u32> = HashMap::new();
        for _ in 0..3000 {
            let key = Uid::new(Timestamp::default());
            let owner = three.owner(key).unwrap().name;
            if &*owner != "10.0.0.2:80" {
                assert_eq!(two.owner(key).unwrap().name, owner);
            }
            *counts.entry(owner).or_default() += 1;
        }
        assert!(counts.values().all(|count| (900..1100).contains(count)), "{counts:?}");
    }

    #[test]
    fn who_could_not_be_reached_comes_last() {
        let three = members(&["a", "b", "c"]);
        let key = RouteKey(Uid::new(Timestamp::default()));
        let turn = AtomicUsize::new(0);
        let names = |members: Vec<Member>| members.into_iter().map(|m| m.name).collect::<Vec<_>>();
        let before = names(three.in_order(Some(key), &turn));
        three.all().iter().find(|member| member.name == before[0]).unwrap().note(false);
        let after = names(three.in_order(Some(key), &turn));
        assert_eq!(after, [before[1].clone(), before[2].clone(), before[0].clone()]);
    }

    #[tokio::test]
    async fn nobody_is_there() {
        let nobody = members(&[]);
        let status = nobody.channel(1000).oneshot(Request::new(Body::empty())).await.unwrap_err();
        assert_eq!(status.message(), "no test is known");
    }
}
