//! An HTTP proxy of a DynamoDB server that can respond in its place.

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

/// Handles the calls of a proxy.
pub(crate) trait Handler: Send + Sync + 'static {
    /// Returns the response to a call.
    fn handle(&self, request: Request) -> impl Future<Output = Response> + Send;
}

/// Starts a proxy; returns its URL.
///
/// # Panics
/// Panics if no port is free.
pub(crate) async fn start(handler: Arc<impl Handler>) -> String {
    async fn serve<H: Handler>(State(handler): State<Arc<H>>, request: Request) -> Response {
        handler.handle(request).await
    }
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
    let address = listener.local_addr().expect("the listener is bound");
    let service = TowerToHyperService::new(Router::new().fallback(serve).with_state(handler));
    tokio::spawn(async move {
        let server = Builder::new(TokioExecutor::new());
        while let Ok((stream, _)) = listener.accept().await {
            stream.set_nodelay(true).expect("the option can be set");
            let (server, service) = (server.clone(), service.clone());
            tokio::spawn(async move {
                // Ignores errors, which occur when clients disconnect.
                drop(server.serve_connection(TokioIo::new(stream), service).await);
            });
        }
    });
    format!("http://{address}")
}

/// The proxied DynamoDB server.
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

    /// Forwards a call.
    pub(crate) async fn forward(&self, request: Request) -> Response {
        let (mut parts, body) = request.into_parts();
        parts.uri = format!("{}{}", self.url, parts.uri.path()).parse().expect("the URL is valid");
        match self.client.request(Request::from_parts(parts, body)).await {
            Ok(response) => response.map(Body::new),
            Err(_) => StatusCode::BAD_GATEWAY.into_response(),
        }
    }
}

/// Returns a DynamoDB error response with the given exception.
pub(crate) fn exception(name: &str) -> Response {
    let body = format!(
        r#"{{"__type":"com.amazonaws.dynamodb.v20120810#{name}","message":"by the test"}}"#
    );
    let kind = [(header::CONTENT_TYPE, "application/x-amz-json-1.0")];
    (StatusCode::BAD_REQUEST, kind, body).into_response()
}
