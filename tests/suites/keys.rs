//! Keys of the operator's own: PEM files, a shared secret, and a JWKS URL whose keys change.
#![allow(clippy::unwrap_used, reason = "in tests, a panic is the report")]

use std::{fs, path::PathBuf};

use jsonwebtoken::{
    Algorithm, EncodingKey, Header, encode,
    jwk::{Jwk, JwkSet},
};
use serde_json::{Value, json};
use streamer_client::ClientError;
use streamer_core::{Clock, SystemClock};
use streamer_tests::{Client, Process, Server, Site};
use tempfile::TempDir;

/// Makes keys with OpenSSL, as an operator would.
struct KeyFolder(TempDir);

struct KeyPair {
    private: EncodingKey,
    public: PathBuf,
}

impl KeyFolder {
    fn new() -> Self {
        Self(TempDir::with_prefix("streamer-keys-").unwrap())
    }

    fn make(&self, name: &str, algorithm: Algorithm) -> KeyPair {
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

async fn refusal(server: &Server, token: &str) -> String {
    match Client::try_connect(&server.url, token).await {
        Err(ClientError::Closed { code: 4401, reason }) => reason,
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("it was let in"),
    }
}

#[tokio::test]
async fn each_algorithm_takes_its_own_keys_only() {
    let keys = KeyFolder::new();
    for algorithm in [Algorithm::RS256, Algorithm::ES256, Algorithm::EdDSA] {
        let (ours, strange) = (keys.make("ours", algorithm), keys.make("strange", algorithm));
        let server =
            start(&[&format!("auth.keys={algorithm:?}:{}", ours.public.to_str().unwrap())]);
        let client = Client::connect(&server.url, &sign(algorithm, None, &ours.private)).await;
        assert_eq!(client.connected["tenant_id"], "acme");
        let reason = refusal(&server, &sign(algorithm, None, &strange.private)).await;
        assert!(reason.contains("signature"), "{reason}");
        let confused = EncodingKey::from_secret(&fs::read(&ours.public).unwrap());
        let reason = refusal(&server, &sign(Algorithm::HS256, None, &confused)).await;
        assert!(reason.contains("algorithm"), "{reason}");
    }
}

#[tokio::test]
async fn a_shared_secret_counts_when_it_is_configured() {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("secret");
    fs::write(&file, "0123456789abcdef0123456789abcdef").unwrap();
    let server = start(&[&format!("auth.keys=HS256:{}", file.display())]);
    let secret = EncodingKey::from_secret(b"0123456789abcdef0123456789abcdef");
    Client::connect(&server.url, &sign(Algorithm::HS256, None, &secret)).await;
    let other = EncodingKey::from_secret(b"another secret of thirty-two bytes");
    let reason = refusal(&server, &sign(Algorithm::HS256, None, &other)).await;
    assert!(reason.contains("signature"), "{reason}");
}

fn published(keys: &[(&str, Algorithm, &EncodingKey)]) -> String {
    let keys = keys.iter().map(|(id, algorithm, key)| {
        let mut key = Jwk::from_encoding_key(key, *algorithm).unwrap();
        key.common.key_id = Some((*id).to_owned());
        key
    });
    serde_json::to_string(&JwkSet { keys: keys.collect() }).unwrap()
}

#[tokio::test]
async fn a_key_set_is_fetched_once_and_again_for_a_new_key() {
    let keys = KeyFolder::new();
    let first = keys.make("first", Algorithm::ES256);
    let second = keys.make("second", Algorithm::RS256);
    let site = Site::start().await;
    let one = ("first", Algorithm::ES256, &first.private);
    site.put("jwks.json", "application/json", published(&[one]));
    let server =
        start(&[&format!("auth.jwks_url={}/jwks.json", site.url), "auth.jwks_min_refresh_ms=0"]);

    let token = sign(Algorithm::ES256, Some("first"), &first.private);
    for _ in 0..3 {
        Client::connect(&server.url, &token).await;
    }
    assert_eq!(site.served("jwks.json"), 1);

    let rotated = sign(Algorithm::RS256, Some("second"), &second.private);
    let reason = refusal(&server, &rotated).await;
    assert!(reason.contains("not accepted here"), "{reason}");
    site.put(
        "jwks.json",
        "application/json",
        published(&[one, ("second", Algorithm::RS256, &second.private)]),
    );
    Client::connect(&server.url, &rotated).await;
    // The issuer is out of reach: what is known serves on.
    site.put("jwks.json", "text/plain", "out of order");
    Client::connect(&server.url, &sign(Algorithm::RS256, Some("second"), &second.private)).await;
    refusal(&server, &sign(Algorithm::RS256, Some("third"), &second.private)).await;
    Client::connect(&server.url, &sign(Algorithm::ES256, Some("first"), &first.private)).await;
}
