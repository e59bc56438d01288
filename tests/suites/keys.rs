//! Keys that an operator configures: PEM files, a shared secret, and a JWKS URL whose keys change.
#![allow(clippy::unwrap_used, reason = "in tests, a panic is the report")]

use std::{fs, path::PathBuf};

use jsonwebtoken::{
    Algorithm, EncodingKey, Header, encode,
    jwk::{Jwk, JwkSet},
};
use serde_json::{Value, json};
use streamer_client::ClientError;
use streamer_core::{Clock, SystemClock};
use streamer_tests::{Client, Process, Server, Site, within_timeout};
use tempfile::TempDir;

/// A folder with keys that are generated with OpenSSL, as by an operator.
struct KeyFolder(TempDir);

struct KeyPair {
    private: EncodingKey,
    public: PathBuf,
}

impl KeyFolder {
    fn new() -> Self {
        Self(TempDir::with_prefix("streamer-keys-").unwrap())
    }

    fn generate(&self, name: &str, algorithm: Algorithm) -> KeyPair {
        let (private, public) =
            (self.0.path().join(format!("{name}.pem")), self.0.path().join(format!("{name}.pub")));
        let kind: &[&str] = match algorithm {
            Algorithm::RS256 => &["-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048"],
            Algorithm::ES256 => &["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"],
            _ => &["-algorithm", "ED25519"],
        };
        openssl(&[&["genpkey", "-out", private.to_str().unwrap()], kind].concat());
        openssl(&[
            "pkey",
            "-in",
            private.to_str().unwrap(),
            "-pubout",
            "-out",
            public.to_str().unwrap(),
        ]);
        let pem = fs::read(&private).unwrap();
        let private = match algorithm {
            Algorithm::RS256 => EncodingKey::from_rsa_pem(&pem),
            Algorithm::ES256 => EncodingKey::from_ec_pem(&pem),
            _ => EncodingKey::from_ed_pem(&pem),
        };
        KeyPair { private: private.unwrap(), public }
    }
}

fn openssl(arguments: &[&str]) {
    let output = Process::output(Process::command("openssl").args(arguments));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

fn claims() -> Value {
    let expires = SystemClock.now().as_millis() / 1000 + 600;
    json!({"iss": "https://issuer.example", "aud": "streamer", "sub": "ann", "tenant_id": "acme",
        "exp": expires})
}

fn sign(algorithm: Algorithm, id: Option<&str>, key: &EncodingKey) -> String {
    let header = Header { kid: id.map(ToOwned::to_owned), ..Header::new(algorithm) };
    encode(&header, &claims(), key).unwrap()
}

fn start(settings: &[&str]) -> Server {
    let common = ["auth.issuers=https://issuer.example", "auth.audiences=streamer"];
    Server::start(&[settings, &common].concat())
}

/// Returns the code and the reason with which a token is rejected, or `None` if the token is accepted.
async fn try_connect(server: &Server, token: &str) -> Option<(u16, String)> {
    match Client::try_connect(&server.url, token).await {
        Err(ClientError::Closed { code, reason }) => Some((code.code(), reason)),
        Err(other) => panic!("{other}"),
        Ok(_) => None,
    }
}

async fn rejection(server: &Server, token: &str) -> String {
    let (code, reason) = try_connect(server, token).await.expect("the token is rejected");
    assert_eq!(code, 4401, "{reason}");
    reason
}

#[tokio::test]
async fn each_algorithm_accepts_only_its_own_keys() {
    let keys = KeyFolder::new();
    for algorithm in [Algorithm::RS256, Algorithm::ES256, Algorithm::EdDSA] {
        let (own, foreign) = (keys.generate("own", algorithm), keys.generate("foreign", algorithm));
        let server = start(&[&format!("auth.keys={algorithm:?}:{}", own.public.to_str().unwrap())]);
        let client = Client::connect(&server.url, &sign(algorithm, None, &own.private)).await;
        assert_eq!(client.connected["tenant_id"], "acme");
        let reason = rejection(&server, &sign(algorithm, None, &foreign.private)).await;
        assert!(reason.contains("signature"), "{reason}");
        let confused = EncodingKey::from_secret(&fs::read(&own.public).unwrap());
        let reason = rejection(&server, &sign(Algorithm::HS256, None, &confused)).await;
        assert!(reason.contains("algorithm"), "{reason}");
    }
}

#[tokio::test]
async fn a_configured_shared_secret_is_accepted() {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("secret");
    fs::write(&file, "0123456789abcdef0123456789abcdef").unwrap();
    let server = start(&[&format!("auth.keys=HS256:{}", file.display())]);
    let secret = EncodingKey::from_secret(b"0123456789abcdef0123456789abcdef");
    Client::connect(&server.url, &sign(Algorithm::HS256, None, &secret)).await;
    let other = EncodingKey::from_secret(b"a different secret of 32 or more bytes");
    let reason = rejection(&server, &sign(Algorithm::HS256, None, &other)).await;
    assert!(reason.contains("signature"), "{reason}");
}

fn key_set(keys: &[(&str, Algorithm, &EncodingKey)]) -> String {
    let keys = keys.iter().map(|(id, algorithm, key)| {
        let mut key = Jwk::from_encoding_key(key, *algorithm).unwrap();
        key.common.key_id = Some((*id).to_owned());
        key
    });
    serde_json::to_string(&JwkSet { keys: keys.collect() }).unwrap()
}

#[tokio::test]
async fn a_key_set_is_fetched_once_and_refetched_for_an_unknown_key() {
    let keys = KeyFolder::new();
    let first = keys.generate("first", Algorithm::ES256);
    let second = keys.generate("second", Algorithm::RS256);
    let site = Site::start().await;
    let one = ("first", Algorithm::ES256, &first.private);
    site.put("jwks.json", "application/json", key_set(&[one]));
    let server = start(&[
        &format!("auth.jwks_url={}/jwks.json", site.url),
        "auth.jwks_min_refresh_interval=0ms",
    ]);

    let token = sign(Algorithm::ES256, Some("first"), &first.private);
    for _ in 0..3 {
        Client::connect(&server.url, &token).await;
    }
    assert_eq!(site.fetches("jwks.json"), 1);

    let rotated = sign(Algorithm::RS256, Some("second"), &second.private);
    let reason = rejection(&server, &rotated).await;
    assert!(reason.contains("algorithm is not accepted"), "{reason}");
    site.put(
        "jwks.json",
        "application/json",
        key_set(&[one, ("second", Algorithm::RS256, &second.private)]),
    );
    Client::connect(&server.url, &rotated).await;
    // The issuer is unavailable: known keys remain valid, and unknown keys are a temporary error.
    site.put("jwks.json", "text/plain", "out of order");
    Client::connect(&server.url, &sign(Algorithm::RS256, Some("second"), &second.private)).await;
    let third = sign(Algorithm::RS256, Some("third"), &second.private);
    assert_eq!(try_connect(&server, &third).await.unwrap().0, 1013);
    Client::connect(&server.url, &sign(Algorithm::ES256, Some("first"), &first.private)).await;
}

/// A site that publishes one key, and a server that fetches it without a minimum interval.
struct Issuer {
    site: Site,
    keys: KeyFolder,
    server: Server,
    token: String,
}

impl Issuer {
    async fn start(settings: &[&str]) -> Self {
        let (site, keys) = (Site::start().await, KeyFolder::new());
        let key = keys.generate("first", Algorithm::EdDSA);
        let set = key_set(&[("first", Algorithm::EdDSA, &key.private)]);
        site.put("jwks.json", "application/json", set);
        let url = format!("auth.jwks_url={}/jwks.json", site.url);
        let common = [&*url, "auth.jwks_min_refresh_interval=0ms", "auth.jwks_max_age=1000ms"];
        let server = start(&[&common, settings].concat());
        let token = sign(Algorithm::EdDSA, Some("first"), &key.private);
        Client::connect(&server.url, &token).await;
        Self { site, keys, server, token }
    }

    /// Waits until the token is rejected; returns the close code.
    async fn rejection_code(&self) -> u16 {
        let rejected = async {
            loop {
                if let Some((code, _)) = try_connect(&self.server, &self.token).await {
                    return code;
                }
            }
        };
        within_timeout("the rejection", rejected).await
    }
}

#[tokio::test]
async fn tokens_of_a_removed_key_are_rejected() {
    let issuer = Issuer::start(&[]).await;
    let second = issuer.keys.generate("second", Algorithm::ES256);
    let rest = key_set(&[("second", Algorithm::ES256, &second.private)]);
    // The second key set is empty, but well-formed.
    for set in [rest, json!({"keys": []}).to_string()] {
        issuer.site.put("jwks.json", "application/json", set);
        assert_eq!(issuer.rejection_code().await, 4401);
    }
    assert_eq!(issuer.rejection_code().await, 4401);
}

#[tokio::test]
async fn cached_keys_stay_valid_for_a_bounded_time_if_fetching_fails() {
    let failures: [fn(&Site); 5] = [
        |site| site.put("jwks.json", "text/plain", "out of order"),
        |site| site.put("jwks.json", "application/json", "{}"),
        |site| site.put("jwks.json", "application/json", r#"{"keys": {}}"#),
        |site| site.redirect("jwks.json", "redirected.json"),
        |site| site.hang("jwks.json"),
    ];
    let issuer = Issuer::start(&[]).await;
    issuer.site.put("redirected.json", "application/json", r#"{"keys": []}"#);
    for fail in failures {
        fail(&issuer.site);
        while issuer.site.fetches("jwks.json") == 0 {
            Client::connect(&issuer.server.url, &issuer.token).await;
        }
    }
    assert_eq!(issuer.site.fetches("redirected.json"), 0, "redirects are not followed");
    let issuer = Issuer::start(&["auth.jwks_max_stale=0ms"]).await;
    issuer.site.put("jwks.json", "text/plain", "out of order");
    assert_eq!(issuer.rejection_code().await, 1013, "the error is temporary");
}

#[tokio::test]
async fn a_malformed_key_in_a_set_does_not_affect_the_others() {
    let issuer = Issuer::start(&[]).await;
    let second = issuer.keys.generate("second", Algorithm::ES256);
    let good = key_set(&[("second", Algorithm::ES256, &second.private)]);
    let mut set: Value = serde_json::from_str(&good).unwrap();
    let keys = set["keys"].as_array_mut().unwrap();
    for bad in [
        json!({"kty": "OKP", "crv": "Ed25519", "x": "AA", "kid": "short"}),
        json!({"kty": "OKP", "crv": "Ed25519", "x": "", "kid": "empty"}),
        json!({"kty": "EC", "crv": "P-256", "x": "AA", "y": "AA", "kid": "point"}),
        json!({"kty": "RSA", "n": "AA", "e": "AQAB", "kid": "small"}),
        json!({"kty": "OKP", "crv": "Ed25519", "x": "AA", "kid": 5}),
        json!("key"),
    ] {
        keys.insert(0, bad);
    }
    issuer.site.put("jwks.json", "application/json", set.to_string());
    let token = |id| sign(Algorithm::ES256, Some(id), &second.private);
    let accepted = async { while try_connect(&issuer.server, &token("second")).await.is_some() {} };
    within_timeout("the new key", accepted).await;
    for id in ["short", "empty", "point", "small"] {
        let forged =
            sign(Algorithm::EdDSA, Some(id), &issuer.keys.generate(id, Algorithm::EdDSA).private);
        assert_eq!(try_connect(&issuer.server, &forged).await.unwrap().0, 4401);
        assert_eq!(try_connect(&issuer.server, &token(id)).await.unwrap().0, 4401);
    }
}

#[tokio::test]
async fn an_unknown_key_is_a_temporary_error_until_the_keys_are_refetched() {
    let issuer =
        Issuer::start(&["auth.jwks_max_age=3000ms", "auth.jwks_min_refresh_interval=3000ms"]).await;
    let second = issuer.keys.generate("second", Algorithm::ES256);
    let unknown = sign(Algorithm::ES256, Some("second"), &second.private);
    let (code, reason) = try_connect(&issuer.server, &unknown).await.unwrap();
    assert_eq!((code, reason.contains("auth.jwks_min_refresh_interval")), (1013, true), "{reason}");
    assert_eq!(issuer.site.fetches("jwks.json"), 1, "the minimum interval has not elapsed");
    let rejected = async {
        loop {
            if let Some((4401, _)) = try_connect(&issuer.server, &unknown).await {
                return;
            }
        }
    };
    within_timeout("the refetch", rejected).await;
    assert_eq!(issuer.site.fetches("jwks.json"), 2);
}
