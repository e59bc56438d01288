//! Authentication: the rules for tokens and for fresh tokens.
#![allow(clippy::unwrap_used, reason = "in tests, a panic is the report")]

use std::{fs, time::Duration};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use ed25519_dalek::{
    SigningKey,
    pkcs8::{DecodePrivateKey, EncodePrivateKey, EncodePublicKey, spki::der::pem::LineEnding},
};
use jsonwebtoken::{Algorithm, EncodingKey, Header, encode};
use serde_json::{Value, json};
use streamer_client::ClientError;
use streamer_core::{Clock, CloseCode, SystemClock};
use streamer_tests::{Client, Server};

async fn rejection(server: &Server, token: &str) -> (u16, String) {
    match Client::try_connect(&server.url, token).await {
        Err(ClientError::Closed { code, reason }) => (code.code(), reason),
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("the server accepted the connection"),
    }
}

fn seconds_from_now(seconds: i64) -> i64 {
    SystemClock.now().as_millis() / 1000 + seconds
}

/// Returns claims that the server accepts.
fn valid_claims() -> Value {
    json!({
        "iss": "streamer-dev", "aud": ["other", "streamer"], "sub": "ann", "tenant_id": "acme",
        "permissions": [], "exp": seconds_from_now(600),
    })
}

fn with(changes: &Value) -> Value {
    let mut claims = valid_claims();
    for (name, value) in changes.as_object().unwrap() {
        if value.is_null() {
            claims.as_object_mut().unwrap().remove(name);
        } else {
            claims[name] = value.clone();
        }
    }
    claims
}

#[tokio::test]
async fn every_violated_token_rule_is_reported() {
    let server = Server::start(&[]);
    let pem = fs::read_to_string(server.data().join("dev-key.pem")).unwrap();
    let key = EncodingKey::from_ed_pem(pem.as_bytes()).unwrap();
    let sign = |claims: &Value| encode(&Header::new(Algorithm::EdDSA), claims, &key).unwrap();
    Client::connect(&server.url, &sign(&valid_claims())).await;

    let cases = [
        (json!({"exp": seconds_from_now(-60)}), "the token expired at"),
        (json!({"nbf": seconds_from_now(600)}), "the token is not valid before"),
        (json!({"iss": "other"}), "claim iss is not an accepted issuer"),
        (json!({"iss": null}), "claim iss is required"),
        (json!({"aud": "other"}), "claim aud does not contain an accepted audience"),
        (json!({"aud": null}), "claim aud is required"),
        (json!({"exp": null}), "claim exp is required"),
        (json!({"tenant_id": null}), "claim tenant_id is required"),
        (json!({"tenant_id": ""}), "claim tenant_id must have 1 to 128"),
        (json!({"tenant_id": "*"}), "claim tenant_id must not be `*`"),
        (json!({"sub": null}), "claim sub is required"),
        (json!({"iat": seconds_from_now(600)}), "claim iat is in the future"),
        (json!({"exp": "soon"}), "claim exp must be a number"),
        (json!({"permissions": 5}), "claim permissions must be an array"),
    ];
    for (changes, expected) in cases {
        let (code, reason) = rejection(&server, &sign(&with(&changes))).await;
        assert_eq!(code, 4401);
        assert!(reason.contains(expected), "{expected} is missing in {reason}");
    }

    let header = Header { crit: Some(vec!["b64".into()]), ..Header::new(Algorithm::EdDSA) };
    let critical = encode(&header, &valid_claims(), &key).unwrap();
    let (code, reason) = rejection(&server, &critical).await;
    assert_eq!((code, reason.contains("header crit")), (4401, true), "{reason}");
    let text = valid_claims().to_string();
    let twice = text.replacen('{', r#"{"sub":"bob","#, 1);
    let part = |text: &str| URL_SAFE_NO_PAD.encode(text);
    let unsigned = format!("{}.{}", part(r#"{"alg":"EdDSA"}"#), part(&twice));
    let signature =
        jsonwebtoken::crypto::sign(unsigned.as_bytes(), &key, Algorithm::EdDSA).unwrap();
    let (code, reason) = rejection(&server, &format!("{unsigned}.{signature}")).await;
    assert_eq!((code, reason.contains("occurs twice")), (4401, true), "{reason}");

    let (code, reason) = rejection(&server, "").await;
    assert_eq!((code, reason.contains("a token is required")), (4401, true), "{reason}");
    let (code, reason) = rejection(&server, "not.a.token").await;
    assert_eq!((code, reason.contains("malformed")), (4401, true), "{reason}");
}

#[tokio::test]
async fn options_limit_tenants_and_token_size() {
    let server = Server::start(&["auth.tenants=acme,globex", "auth.max_token_bytes=600"]);
    for tenant in ["acme", "globex"] {
        Client::connect(&server.url, &server.token(tenant, "ann", &[])).await;
    }
    let (code, reason) = rejection(&server, &server.token("initech", "ann", &[])).await;
    assert_eq!((code, reason.contains("is not an accepted tenant")), (4401, true), "{reason}");
    let long = "x".repeat(600);
    let (code, reason) = rejection(&server, &server.token("acme", "ann", &[&long])).await;
    assert_eq!((code, reason.contains("at most 600 bytes")), (4401, true), "{reason}");
}

#[tokio::test]
async fn the_algorithm_is_not_taken_from_the_token() {
    let server = Server::start(&[]);
    let pem = fs::read_to_string(server.data().join("dev-key.pem")).unwrap();
    let public = SigningKey::from_pkcs8_pem(&pem).unwrap().verifying_key();
    let public = public.to_public_key_pem(LineEnding::LF).unwrap();
    let claims = valid_claims();

    let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
    for name in ["none", "None", "nOnE"] {
        let unsigned = format!("{}.{}.", part(&json!({"alg": name, "typ": "JWT"})), part(&claims));
        assert_eq!(rejection(&server, &unsigned).await.0, 4401);
    }
    // Algorithm confusion: the token is signed with the public key as a shared secret.
    let confused = EncodingKey::from_secret(public.as_bytes());
    let confused = encode(&Header::new(Algorithm::HS256), &claims, &confused).unwrap();
    let (code, reason) = rejection(&server, &confused).await;
    assert_eq!((code, reason.contains("algorithm")), (4401, true), "{reason}");

    let mut seed = [0; 32];
    getrandom::fill(&mut seed).unwrap();
    let foreign = SigningKey::from_bytes(&seed).to_pkcs8_pem(LineEnding::LF).unwrap();
    let foreign = EncodingKey::from_ed_pem(foreign.as_bytes()).unwrap();
    let forged = encode(&Header::new(Algorithm::EdDSA), &claims, &foreign).unwrap();
    let (code, reason) = rejection(&server, &forged).await;
    assert_eq!((code, reason.contains("signature")), (4401, true), "{reason}");
}

#[tokio::test]
async fn too_many_connections_of_one_user_are_rejected() {
    let server = Server::start(&["gateway.max_connections_per_user=2"]);
    let token = server.token("acme", "ann", &[]);
    let first = Client::connect(&server.url, &token).await;
    let _second = Client::connect(&server.url, &token).await;
    let (code, reason) = rejection(&server, &token).await;
    assert_eq!(
        (code, reason.contains("gateway.max_connections_per_user")),
        (4429, true),
        "{reason}"
    );
    Client::connect(&server.url, &server.token("acme", "bob", &[])).await;
    drop(first);
}

#[tokio::test]
async fn only_a_fresh_token_of_the_same_user_extends_a_connection() {
    let server = Server::start(&[]);
    let short = server.token_for("acme", "ann", &[], Duration::from_secs(30));
    let mut client = Client::connect(&server.url, &short).await;
    let fresh = server.token("acme", "ann", &[]);
    client.send(json!({"type": "auth", "token": fresh})).await;
    loop {
        match client.next().await["type"].as_str().unwrap() {
            "auth_expiring" => {}
            "authenticated" => break,
            other => panic!("{other}"),
        }
    }
    let rejected = loop {
        let reply = client.request(json!({"type": "auth", "token": "x.y.z"})).await;
        if reply["type"] != "auth_expiring" {
            break reply;
        }
    };
    assert_eq!(rejected["error"]["code"], "UNAUTHORIZED");
    client.send(json!({"type": "auth", "token": server.token("acme", "bob", &[])})).await;
    let closed = client.try_next().await;
    assert!(
        matches!(closed, Err(ClientError::Closed { code: CloseCode::Forbidden, .. })),
        "{closed:?}"
    );
}
