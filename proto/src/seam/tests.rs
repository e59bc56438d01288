use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use prost::bytes::Bytes;
use tokio::sync::oneshot;
use tonic::{async_trait, metadata::MetadataValue};

use super::*;
use crate::{
    common::v1::{Event, Output, Payload, event::Kind, payload::Body as PayloadBody},
    progress::v1::{
        ListEventsRequest, ListEventsResponse, WatchRequest, WatchResponse,
        progress_service_server::ProgressService,
    },
    stubs::{ProgressServiceEndpoint, ProgressServiceStub},
};

/// Service whose responses depend on `request_id`.
#[derive(Default)]
struct Scripted {
    dropped: Arc<AtomicBool>,
}

fn event(seq: i64, bytes: usize) -> Event {
    let data = Payload {
        content_type: "text/plain".into(),
        body: Some(PayloadBody::Data(Bytes::from(vec![b'x'; bytes]))),
    };
    Event {
        seq,
        kind: Some(Kind::Output(Output { chunk_index: 0, data: Some(data) })),
        ..Event::default()
    }
}

struct SetOnDrop(Arc<AtomicBool>);

impl Drop for SetOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[async_trait]
impl ProgressService for Scripted {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<WatchResponse, Status>> + Send>>;

    async fn watch(
        &self,
        request: Request<WatchRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        if request.get_ref().request_id == "missing" {
            return Err(Status::not_found("no such request"));
        }
        let page = |seq| WatchResponse { events: vec![event(seq, 10)], ..WatchResponse::default() };
        let items = [Ok(page(1)), Ok(page(2)), Err(Status::data_loss("torn")), Ok(page(3))];
        let endless = request.get_ref().request_id == "endless";
        let rest = tokio_stream::pending().take(if endless { usize::MAX } else { 0 });
        let items = tokio_stream::iter(items).take(if endless { 1 } else { 4 });
        Ok(Response::new(Box::pin(items.chain(rest))))
    }

    async fn list_events(
        &self,
        request: Request<ListEventsRequest>,
    ) -> Result<Response<ListEventsResponse>, Status> {
        let guard = SetOnDrop(self.dropped.clone());
        let tenant = request.metadata().get("tenant").cloned();
        let message = request.into_inner();
        match message.request_id.as_str() {
            "missing" => {
                let details = Bytes::from_static(b"\x01\x02");
                return Err(Status::with_details(Code::NotFound, "no such request é", details));
            }
            "slow" => std::future::pending::<()>().await,
            _ => {}
        }
        drop(guard);
        let size = usize::try_from(message.after_seq).unwrap();
        let page = ListEventsResponse { events: vec![event(1, size)], ..Default::default() };
        let mut response = Response::new(page);
        if let Some(tenant) = tenant {
            response.metadata_mut().insert("tenant", tenant);
        }
        Ok(response)
    }
}

/// Returns stubs that call the same service locally, and encoded.
fn both(service: Scripted) -> [ProgressServiceStub; 2] {
    let endpoint = ProgressServiceEndpoint::new(service)
        .max_decoding_message_size(100)
        .max_encoding_message_size(1000);
    let transport = || {
        let endpoint =
            ServiceExt::<http::Request<Body>>::map_err(endpoint.clone(), |never| match never {});
        BoxCloneSyncService::new(endpoint)
    };
    [Channel::Local(transport()), Channel::Remote(transport())].map(ProgressServiceStub::new)
}

fn list(request_id: &str, size: i64) -> Request<ListEventsRequest> {
    let request_id = request_id.to_owned();
    Request::new(ListEventsRequest { request_id, after_seq: size, ..Default::default() })
}

fn watch(request_id: &str) -> WatchRequest {
    WatchRequest { request_id: request_id.to_owned(), ..WatchRequest::default() }
}

#[tokio::test]
async fn messages_and_metadata_are_the_same_for_both_kinds_of_call() {
    for mut stub in both(Scripted::default()) {
        let mut request = list("r", 10);
        request.metadata_mut().insert("tenant", MetadataValue::from_static("acme"));
        let response = stub.list_events(request).await.unwrap();
        assert_eq!(response.metadata().get("tenant").unwrap(), "acme");
        assert_eq!(response.get_ref().events, [event(1, 10)]);
    }
}

#[tokio::test]
async fn errors_are_the_same_for_both_kinds_of_call() {
    let mut errors = Vec::new();
    for mut stub in both(Scripted::default()) {
        let missing = stub.list_events(list("missing", 0)).await.unwrap_err();
        assert_eq!((missing.code(), missing.message()), (Code::NotFound, "no such request é"));
        assert_eq!(missing.details(), b"\x01\x02");
        // The request, the response, and the response for the stub are too large.
        let long = stub.list_events(list(&"r".repeat(200), 0)).await.unwrap_err();
        let large = stub.list_events(list("r", 2000)).await.unwrap_err();
        let mut stub = stub.max_decoding_message_size(50);
        let unexpected = stub.list_events(list("r", 60)).await.unwrap_err();
        let mut stub = stub.max_encoding_message_size(20);
        let unsent = stub.list_events(list(&"r".repeat(30), 0)).await.unwrap_err();
        let unwatched = stub.watch(watch("missing")).await.unwrap_err();
        assert_eq!(unwatched.code(), Code::NotFound);
        errors.push([long, large, unexpected, unsent].map(|error| {
            assert_eq!(error.code(), Code::OutOfRange);
            error.message().to_owned()
        }));
    }
    assert_eq!(errors[0], errors[1]);
}

#[tokio::test]
async fn a_stream_ends_with_its_first_error() {
    for mut stub in both(Scripted::default()) {
        let mut stream = stub.watch(watch("r")).await.unwrap().into_inner();
        for seq in [1, 2] {
            assert_eq!(stream.message().await.unwrap().unwrap().events, [event(seq, 10)]);
        }
        assert_eq!(stream.message().await.unwrap_err().code(), Code::DataLoss);
        assert_eq!(stream.message().await.unwrap(), None);
    }
}

#[tokio::test(start_paused = true)]
async fn middleware_ends_a_local_stream() {
    let endpoint = ProgressServiceEndpoint::new(Scripted::default());
    let (end, ended) = oneshot::channel::<Status>();
    let ended = Arc::new(Mutex::new(Some(ended)));
    let transport = tower::service_fn(move |request: http::Request<Body>| {
        let (mut endpoint, ended) = (endpoint.clone(), ended.lock().unwrap().take().unwrap());
        async move {
            let Ok(response) = endpoint.call(request).await;
            assert!(is_local_response(&response));
            assert!(end_local(&response, async { ended.await.unwrap() }).is_ok());
            Ok(response)
        }
    });
    let mut stub = ProgressServiceStub::new(Channel::Local(BoxCloneSyncService::new(transport)));
    let mut stream = stub.watch(watch("endless")).await.unwrap().into_inner();
    assert!(stream.message().await.unwrap().is_some());
    let waiting = tokio::time::timeout(Duration::from_millis(1), stream.message()).await;
    assert!(waiting.is_err(), "the stream has not ended");
    end.send(Status::unauthenticated("the token has expired")).unwrap();
    assert_eq!(stream.message().await.unwrap_err().code(), Code::Unauthenticated);
    assert_eq!(stream.message().await.unwrap(), None);
}

#[tokio::test(start_paused = true)]
async fn a_call_that_the_caller_drops_is_cancelled() {
    let service = Scripted::default();
    let dropped = service.dropped.clone();
    let [mut local, _] = both(service);
    let call = local.list_events(list("slow", 0));
    assert!(tokio::time::timeout(Duration::from_millis(1), call).await.is_err());
    assert!(dropped.load(Ordering::Relaxed));
}
