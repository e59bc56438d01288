//! An HTTP server in front of a real DynamoDB, which may answer for it.

use std::sync::Arc;

use axum::{
    Router,
    body::Body,
    extract::{Request, State},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::{TokioExecutor, TokioIo},
    server::conn::auto::Builder,
    service::TowerToHyperService,
};
use tokio::net::TcpListener;

/// Answers every call.
pub(crate) trait Answer: Send + Sync + 'static {
    /// This one.
    fn answer(&self, request: Request) -> impl Future<Output = Response> + Send;
}

/// Starts a server; returns its URL.
///
/// # Panics
/// When there is no port for it.
pub(crate) async fn start(answer: Arc<impl Answer>) -> String {
    async fn serve<A: Answer>(State(answer): State<Arc<A>>, request: Request) -> Response {
        answer.answer(request).await
    }
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
    let address = listener.local_addr().expect("it listens");
    let service = TowerToHyperService::new(Router::new().fallback(serve).with_state(answer));
    tokio::spawn(async move {
        let server = Builder::new(TokioExecutor::new());
        while let Ok((stream, _)) = listener.accept().await {
            stream.set_nodelay(true).expect("a connection can be set up");
            let (server, service) = (server.clone(), service.clone());
            tokio::spawn(async move {
                // A client that goes away is no fault of ours.
                drop(server.serve_connection(TokioIo::new(stream), service).await);
            });
        }
    });
    format!("http://{address}")
}

/// The real one.
pub(crate) struct Upstream {
    url: String,
    client: Client<HttpConnector, Body>,
}

impl Upstream {
    pub(crate) fn new(url: &str) -> Self {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        let client = Client::builder(TokioExecutor::new()).build(connector);
        Self { url: url.trim_end_matches('/').to_owned(), client }
    }

    /// Passes a call on.
    pub(crate) async fn forward(&self, request: Request) -> Response {
        let (mut parts, body) = request.into_parts();
        parts.uri = format!("{}{}", self.url, parts.uri.path()).parse().expect("an address");
        match self.client.request(Request::from_parts(parts, body)).await {
            Ok(response) => response.map(Body::new),
            Err(_) => StatusCode::BAD_GATEWAY.into_response(),
        }
    }
}

/// What DynamoDB answers when it does not do something.
pub(crate) fn exception(name: &str) -> Response {
    let body = format!(
        r#"{{"__type":"com.amazonaws.dynamodb.v20120810#{name}","message":"by the test"}}"#
    );
    let kind = [(header::CONTENT_TYPE, "application/x-amz-json-1.0")];
    (StatusCode::BAD_REQUEST, kind, body).into_response()
}
