//! Access log: a line for each HTTP request and gRPC call of a client.

use std::time::Instant;

use axum::{extract::Request, middleware::Next, response::Response};
use http::{Uri, header};
use streamer_core::validate;
use streamer_gateway::ACCESS_LOG;
use streamer_rpc::{Peer, code_name, response_code};

use crate::server::grpc_middleware::is_grpc;

/// Maximum length of a path in a response or log line, in characters.
const MAX_PATH_CHARS: usize = 128;

/// Logs a request after the beginning of its response. The line omits the query, which may contain a token.
pub(crate) async fn log_access(request: Request, next: Next) -> Response {
    let start = Instant::now();
    let method = validate::logged_text(request.method().as_str());
    let path = truncated_path(request.uri());
    let client = request.extensions().get::<Peer>().map(|peer| peer.address().ip());
    let response = next.run(request).await;
    let status = response.status().as_u16();
    let is_grpc = response.headers().get(header::CONTENT_TYPE).is_some_and(is_grpc);
    let code = is_grpc.then(|| code_name(response_code(response.headers())));
    let client = client.map(tracing::field::display);
    let duration_ms = start.elapsed().as_secs_f64() * 1000.0;
    tracing::info!(target: ACCESS_LOG, client, method, path, status, code, duration_ms, "request");
    response
}

/// Returns the beginning of the path of a request, without its query.
pub(crate) fn truncated_path(uri: &Uri) -> String {
    uri.path().chars().take(MAX_PATH_CHARS).collect()
}
