//! Parses the opening handshake (RFC 6455 section 4.2) and the sources of the token.

use std::borrow::Cow;

use base64::{Engine, engine::general_purpose::STANDARD};
use http::{HeaderMap, HeaderName, Method, StatusCode, Uri, header};
use percent_encoding::percent_decode_str;
use sha1::{Digest, Sha1};

/// The supported subprotocol, which is also the default.
pub(crate) const JSON_SUBPROTOCOL: &str = "streamer.v1.json";
const BEARER_PREFIX: &str = "bearer.";
/// Constant that is appended to the key of the client (RFC 6455 section 1.3).
const ACCEPT_GUID: &str = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11";

/// A request to open a WebSocket.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Handshake {
    /// Value of `Sec-WebSocket-Accept`.
    pub(crate) accept: String,
    /// Subprotocol of the response; `None` if the client requested none. A browser fails the handshake and exposes
    /// no close code unless the response selects a subprotocol that the browser requested.
    pub(crate) subprotocol: Option<String>,
    /// Whether the client requested subprotocols, none of which is supported.
    pub(crate) unsupported_subprotocol: bool,
    /// Token from the first source that contains one.
    pub(crate) token: Option<String>,
    /// Value of `Origin`.
    pub(crate) origin: Option<String>,
    /// Value of `User-Agent`.
    pub(crate) user_agent: String,
}

/// Parses a request.
///
/// # Errors
/// Returns the HTTP status and reason of the response if the request is not a valid handshake.
pub(crate) fn parse(
    method: &Method,
    uri: &Uri,
    headers: &HeaderMap,
) -> Result<Handshake, (StatusCode, &'static str)> {
    let bad = |reason| Err((StatusCode::BAD_REQUEST, reason));
    if method != Method::GET {
        return Err((StatusCode::METHOD_NOT_ALLOWED, "a WebSocket handshake must use GET"));
    }
    if !has_token(headers, &header::UPGRADE, "websocket")
        || !has_token(headers, &header::CONNECTION, "upgrade")
    {
        return Err((
            StatusCode::UPGRADE_REQUIRED,
            "this is a WebSocket endpoint: send `Connection: Upgrade` and `Upgrade: websocket`",
        ));
    }
    if text(headers, &header::SEC_WEBSOCKET_VERSION) != Some("13") {
        return Err((StatusCode::UPGRADE_REQUIRED, "Sec-WebSocket-Version must be 13"));
    }
    if is_repeated(headers, &header::HOST) || is_repeated(headers, &header::SEC_WEBSOCKET_KEY) {
        return bad("Host and Sec-WebSocket-Key must appear once");
    }
    if headers.get(header::HOST).is_none() && uri.authority().is_none() {
        return bad("Host is required");
    }
    let Some(key) = text(headers, &header::SEC_WEBSOCKET_KEY) else {
        return bad("Sec-WebSocket-Key is required");
    };
    if !STANDARD.decode(key).is_ok_and(|nonce| nonce.len() == 16) {
        return bad("Sec-WebSocket-Key must be a Base64-encoded 16-byte value");
    }
    let subprotocols: Vec<&str> = tokens(headers, &header::SEC_WEBSOCKET_PROTOCOL).collect();
    let is_supported = subprotocols.contains(&JSON_SUBPROTOCOL);
    // A token is selected only if no other subprotocol was requested, because response headers may be logged.
    let other = subprotocols.iter().find(|subprotocol| !subprotocol.starts_with(BEARER_PREFIX));
    let selected =
        if is_supported { Some(&JSON_SUBPROTOCOL) } else { other.or(subprotocols.first()) };
    Ok(Handshake {
        accept: STANDARD.encode(Sha1::new().chain_update(key).chain_update(ACCEPT_GUID).finalize()),
        subprotocol: selected.map(|subprotocol| (*subprotocol).to_owned()),
        unsupported_subprotocol: other.is_some() && !is_supported,
        token: find_token(uri, headers, &subprotocols),
        // An invalid value is kept, so that it matches no allowed origin.
        origin: headers
            .get(header::ORIGIN)
            .map(|origin| String::from_utf8_lossy(origin.as_bytes()).into_owned()),
        user_agent: text(headers, &header::USER_AGENT)
            .unwrap_or_default()
            .chars()
            .take(256)
            .collect(),
    })
}

/// Returns the token from the header `Authorization`, else from the subprotocol `bearer.<token>`, else from the
/// query parameter `token` or `Authorization`.
fn find_token(uri: &Uri, headers: &HeaderMap, subprotocols: &[&str]) -> Option<String> {
    // Browsers add `Basic` credentials when a proxy requires them; these are skipped.
    // A value that is not text is kept and rejected as an invalid token.
    let authorization = headers.get(header::AUTHORIZATION);
    let authorization = authorization.map(|value| String::from_utf8_lossy(value.as_bytes()));
    if let Some(token) = authorization.as_deref().and_then(bearer) {
        return Some(token.to_owned());
    }
    if let Some(token) = subprotocols.iter().find_map(|name| name.strip_prefix(BEARER_PREFIX)) {
        return Some(token.to_owned());
    }
    let parameters = uri.query()?.split('&').filter_map(|pair| pair.split_once('='));
    parameters
        .filter(|(name, _)| *name == "token" || name.eq_ignore_ascii_case("authorization"))
        .map(|(_, value)| decode_parameter(value))
        .find(|value| !value.is_empty())
        .map(|value| without_scheme(&value).to_owned())
}

fn decode_parameter(value: &str) -> Cow<'_, str> {
    // In a query, `+` stands for a space. A token contains neither.
    let spaced = value.replace('+', " ");
    Cow::Owned(percent_decode_str(&spaced).decode_utf8_lossy().into_owned())
}

fn without_scheme(value: &str) -> &str {
    bearer(value).unwrap_or_else(|| value.trim())
}

fn bearer(value: &str) -> Option<&str> {
    let (scheme, token) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

fn text<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

fn is_repeated(headers: &HeaderMap, name: &HeaderName) -> bool {
    headers.get_all(name).into_iter().nth(1).is_some()
}

fn tokens<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a str> {
    let values = headers.get_all(name).into_iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).map(str::trim).filter(|token| !token.is_empty())
}

fn has_token(headers: &HeaderMap, name: &HeaderName, expected: &str) -> bool {
    tokens(headers, name).any(|token| token.eq_ignore_ascii_case(expected))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(extra: &[(&'static str, &str)]) -> HeaderMap {
        let required = [
            ("host", "127.0.0.1"),
            ("connection", "keep-alive, Upgrade"),
            ("upgrade", "WebSocket"),
            ("sec-websocket-version", "13"),
            ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
        ];
        let mut headers = HeaderMap::new();
        for (name, value) in required.iter().chain(extra) {
            headers.insert(HeaderName::from_static(name), value.parse().unwrap());
        }
        headers
    }

    fn handshake(uri: &str, extra: &[(&'static str, &str)]) -> Handshake {
        parse(&Method::GET, &uri.parse().unwrap(), &headers(extra)).unwrap()
    }

    #[test]
    fn the_accept_key_matches_the_example_of_the_rfc() {
        // From RFC 6455 section 1.3.
        assert_eq!(handshake("/ws", &[]).accept, "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
    }

    #[test]
    fn the_token_is_read_from_every_source() {
        let token = |uri, extra: &[_]| handshake(uri, extra).token;
        assert_eq!(token("/ws", &[("authorization", "Bearer a.b.c")]).as_deref(), Some("a.b.c"));
        let subprotocols = ("sec-websocket-protocol", "streamer.v1.json, bearer.a.b.c");
        assert_eq!(token("/ws", &[subprotocols]).as_deref(), Some("a.b.c"));
        let basic = ("authorization", "Basic dXNlcjpwYXNz");
        assert_eq!(token("/ws", &[subprotocols, basic]).as_deref(), Some("a.b.c"));
        assert_eq!(token("/ws?x=1&token=a.b.c", &[]).as_deref(), Some("a.b.c"));
        assert_eq!(token("/ws?Authorization=Bearer%20a.b.c", &[]).as_deref(), Some("a.b.c"));
        assert_eq!(token("/ws?Authorization=Bearer+a.b.c", &[]).as_deref(), Some("a.b.c"));
        assert_eq!(token("/ws?token=", &[]), None);
    }

    #[test]
    fn the_response_selects_a_requested_subprotocol() {
        let selected = |value| {
            let handshake = handshake("/ws", &[("sec-websocket-protocol", value)]);
            (handshake.subprotocol.unwrap(), handshake.unsupported_subprotocol)
        };
        assert_eq!(selected("graphql-ws, streamer.v1.json"), (JSON_SUBPROTOCOL.into(), false));
        assert_eq!(selected("bearer.x, streamer.v1.json"), (JSON_SUBPROTOCOL.into(), false));
        assert_eq!(selected("bearer.x"), ("bearer.x".into(), false));
        // A browser exposes the close code that follows only after this selection.
        assert_eq!(selected("bearer.x, other"), ("other".into(), true));
        assert_eq!(selected("graphql-ws, other"), ("graphql-ws".into(), true));
        assert_eq!(handshake("/ws", &[]).subprotocol, None);
    }

    #[test]
    fn host_and_key_must_appear_once() {
        for name in ["host", "sec-websocket-key"] {
            let mut twice = headers(&[]);
            let value = twice[name].clone();
            twice.append(HeaderName::from_static(name), value);
            let mut missing = headers(&[]);
            missing.remove(name);
            for headers in [twice, missing] {
                let rejected = parse(&Method::GET, &"/ws".parse().unwrap(), &headers).unwrap_err();
                assert_eq!(rejected.0, StatusCode::BAD_REQUEST, "{name}");
            }
        }
    }

    #[test]
    fn other_requests_are_rejected() {
        let rejected = |method, headers: &HeaderMap| {
            parse(&method, &"/ws".parse().unwrap(), headers).unwrap_err().0
        };
        assert_eq!(rejected(Method::POST, &headers(&[])), StatusCode::METHOD_NOT_ALLOWED);
        assert_eq!(rejected(Method::GET, &HeaderMap::new()), StatusCode::UPGRADE_REQUIRED);
        let short = headers(&[("sec-websocket-key", "c2hvcnQ=")]);
        assert_eq!(rejected(Method::GET, &short), StatusCode::BAD_REQUEST);
    }
}
