//! A DynamoDB that has too much to do: in front of a real one, it refuses some of the calls.

use std::sync::{
    Arc,
    atomic::{AtomicU8, AtomicU64, Ordering},
};

use axum::{
    Router,
    body::Body,
    extract::{Request, State},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use tokio::net::TcpListener;

/// Which calls are refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Throttling {
    /// None.
    Nothing = 0,
    /// Every third.
    EveryThird = 1,
    /// All.
    Everything = 2,
}

/// A running one.
pub struct Throttle {
    /// Where it is asked.
    pub endpoint: String,
    state: Arc<Inner>,
}

struct Inner {
    target: String,
    client: Client<HttpConnector, Body>,
    throttling: AtomicU8,
    calls: AtomicU64,
    refused: AtomicU64,
}

impl Throttle {
    /// Starts one in front of this endpoint.
    ///
    /// # Panics
    /// When there is no port for it.
    pub async fn start(target: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
        let address = listener.local_addr().expect("it listens");
        let state = Arc::new(Inner {
            target: target.trim_end_matches('/').to_owned(),
            client: Client::builder(TokioExecutor::new()).build_http(),
            throttling: AtomicU8::new(Throttling::Nothing as u8),
            calls: AtomicU64::new(0),
            refused: AtomicU64::new(0),
        });
        let router = Router::new().fallback(answer).with_state(state.clone());
        let service = hyper_util::service::TowerToHyperService::new(router);
        tokio::spawn(async move {
            let server = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
            while let Ok((stream, _)) = listener.accept().await {
                let (server, service) = (server.clone(), service.clone());
                tokio::spawn(async move {
                    let stream = hyper_util::rt::TokioIo::new(stream);
                    // A client that goes away is no fault of ours.
                    drop(server.serve_connection(stream, service).await);
                });
            }
        });
        Self { endpoint: format!("http://{address}"), state }
    }

    /// From now on these calls are refused.
    pub fn set(&self, throttling: Throttling) {
        self.state.throttling.store(throttling as u8, Ordering::SeqCst);
    }

    /// How many calls were refused.
    #[must_use]
    pub fn refused(&self) -> u64 {
        self.state.refused.load(Ordering::SeqCst)
    }
}

async fn answer(State(state): State<Arc<Inner>>, request: Request) -> Response {
    let number = state.calls.fetch_add(1, Ordering::SeqCst);
    let refuse = match state.throttling.load(Ordering::SeqCst) {
        1 => number.is_multiple_of(3),
        2 => true,
        _ => false,
    };
    if refuse {
        state.refused.fetch_add(1, Ordering::SeqCst);
        let body = r#"{"__type":"com.amazonaws.dynamodb.v20120810#ProvisionedThroughputExceededException","message":"throttled by the test"}"#;
        let kind = [(header::CONTENT_TYPE, "application/x-amz-json-1.0")];
        return (StatusCode::BAD_REQUEST, kind, body).into_response();
    }
    let (mut parts, body) = request.into_parts();
    let target = format!("{}{}", state.target, parts.uri.path());
    parts.uri = target.parse().expect("an address");
    match state.client.request(Request::from_parts(parts, body)).await {
        Ok(response) => response.map(Body::new),
        Err(_) => StatusCode::BAD_GATEWAY.into_response(),
    }
}
