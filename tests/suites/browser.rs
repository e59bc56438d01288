//! Tests of the WebSocket protocol from a page in a real browser, without a client library.
#![allow(clippy::unwrap_used, reason = "in tests, a panic is the report")]

use serde_json::{Value, json};
use streamer_tests::{Browser, Server, Site};

const PAGE: &str = r#"<!doctype html><meta charset="utf-8"><title>Streamer</title>
<script type="module">
const { server, token } = await (await fetch("/settings.json")).json();
const messages = [];
const report = (outcome) =>
  fetch("/report", { method: "POST", body: JSON.stringify({ ...outcome, messages }) });
// Browsers cannot set headers: the token is a subprotocol.
const socket = new WebSocket(server, ["streamer.v1.json", "bearer." + token]);
socket.onopen = () => socket.send(JSON.stringify({
  id: "from-a-page", action: "echo_async",
  payload: { steps: 3, output_chunks: 2, result: { text: "\u0000 é 😀" } },
}));
socket.onmessage = ({ data }) => {
  messages.push(JSON.parse(data));
  if (messages.at(-1).type === "complete") {
    socket.onclose = ({ code }) => report({ protocol: socket.protocol, code });
    socket.close(1000);
  }
};
socket.onclose = ({ code, reason }) => report({ code, reason });
</script>"#;

async fn visit(site: &mut Site, server: &Server, token: &str) -> Value {
    let socket = format!("{}/ws", server.url.replacen("http", "ws", 1));
    let settings = json!({"server": socket, "token": token}).to_string();
    site.put("settings.json", "application/json", settings);
    site.put("page.html", "text/html", PAGE);
    let _browser = Browser::open(&format!("{}/page.html", site.url));
    serde_json::from_str(&site.next_report().await).unwrap()
}

#[tokio::test]
async fn a_page_submits_follows_and_closes() {
    let server = Server::start(&[]);
    let mut site = Site::start().await;
    let outcome = visit(&mut site, &server, &server.token("acme", "ann", &[])).await;
    assert_eq!(
        (&outcome["protocol"], &outcome["code"]),
        (&json!("streamer.v1.json"), &json!(1000))
    );
    let messages = outcome["messages"].as_array().unwrap();
    let kinds: Vec<&str> =
        messages.iter().map(|message| message["type"].as_str().unwrap()).collect();
    assert_eq!(kinds[..3], ["connected", "acknowledgment", "started"]);
    let seqs: Vec<i64> =
        messages[2..].iter().map(|message| message["seq"].as_i64().unwrap()).collect();
    assert_eq!(seqs, (2..=8).collect::<Vec<_>>());
    assert_eq!(messages.last().unwrap()["result"]["text"], "\u{0} é 😀");
}

#[tokio::test]
async fn a_page_receives_the_reason_of_a_rejection() {
    let server = Server::start(&[]);
    let mut site = Site::start().await;
    let outcome = visit(&mut site, &server, "not.a.token").await;
    assert_eq!(outcome["code"], 4401, "{outcome}");
    assert!(outcome["reason"].as_str().unwrap().contains("malformed"), "{outcome}");

    let strict = Server::start(&["gateway.allowed_origins=https://app.example.com"]);
    let outcome = visit(&mut site, &strict, &strict.token("acme", "ann", &[])).await;
    assert_eq!(outcome["code"], 4403, "{outcome}");
    assert!(outcome["reason"].as_str().unwrap().contains("allowed_origins"), "{outcome}");
}
