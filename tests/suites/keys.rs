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
use streamer_tests::{Client, Process, Server, Site, in_time};
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

/// The code and the reason with which this token is not let in; `None` when it is.
async fn outcome(server: &Server, token: &str) -> Option<(u16, String)> {
    match Client::try_connect(&server.url, token).await {
        Err(ClientError::Closed { code, reason }) => Some((code, reason)),
        Err(other) => panic!("{other}"),
        Ok(_) => None,
    }
}

async fn refusal(server: &Server, token: &str) -> String {
    let (code, reason) = outcome(server, token).await.expect("it is not let in");
    assert_eq!(code, 4401, "{reason}");
    reason
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
    // The issuer is out of reach: what is known serves on, and what is not known may be good.
    site.put("jwks.json", "text/plain", "out of order");
    Client::connect(&server.url, &sign(Algorithm::RS256, Some("second"), &second.private)).await;
    let third = sign(Algorithm::RS256, Some("third"), &second.private);
    assert_eq!(outcome(&server, &third).await.unwrap().0, 1013);
    Client::connect(&server.url, &sign(Algorithm::ES256, Some("first"), &first.private)).await;
}

/// A site that publishes one key, and a server that looks there whenever it needs to.
struct Issuer {
    site: Site,
    keys: KeyFolder,
    server: Server,
    token: String,
}

impl Issuer {
    async fn start(settings: &[&str]) -> Self {
        let (site, keys) = (Site::start().await, KeyFolder::new());
        let key = keys.make("first", Algorithm::EdDSA);
        let set = published(&[("first", Algorithm::EdDSA, &key.private)]);
        site.put("jwks.json", "application/json", set);
        let url = format!("auth.jwks_url={}/jwks.json", site.url);
        let common = [&*url, "auth.jwks_min_refresh_ms=0", "auth.jwks_max_age_ms=1000"];
        let server = start(&[&common, settings].concat());
        let token = sign(Algorithm::EdDSA, Some("first"), &key.private);
        Client::connect(&server.url, &token).await;
        Self { site, keys, server, token }
    }

    /// The code with which the token that was good is refused, once it is.
    async fn refused(&self) -> u16 {
        let refused = async {
            loop {
                if let Some((code, _)) = outcome(&self.server, &self.token).await {
                    return code;
                }
            }
        };
        in_time("the refusal", refused).await
    }
}

#[tokio::test]
async fn a_key_that_is_withdrawn_takes_its_tokens_along() {
    let issuer = Issuer::start(&[]).await;
    let second = issuer.keys.make("second", Algorithm::ES256);
    let rest = published(&[("second", Algorithm::ES256, &second.private)]);
    // The last one, too: a set that is well-formed counts.
    for set in [rest, json!({"keys": []}).to_string()] {
        issuer.site.put("jwks.json", "application/json", set);
        assert_eq!(issuer.refused().await, 4401);
    }
    assert_eq!(issuer.refused().await, 4401);
}

#[tokio::test]
async fn keys_that_cannot_be_fetched_count_on_for_a_bounded_time() {
    let tries: [fn(&Site); 5] = [
        |site| site.put("jwks.json", "text/plain", "out of order"),
        |site| site.put("jwks.json", "application/json", "{}"),
        |site| site.put("jwks.json", "application/json", r#"{"keys": {}}"#),
        |site| site.redirect("jwks.json", "elsewhere.json"),
        |site| site.hang("jwks.json"),
    ];
    let issuer = Issuer::start(&[]).await;
    issuer.site.put("elsewhere.json", "application/json", r#"{"keys": []}"#);
    for change in tries {
        change(&issuer.site);
        while issuer.site.served("jwks.json") == 0 {
            Client::connect(&issuer.server.url, &issuer.token).await;
        }
    }
    assert_eq!(issuer.site.served("elsewhere.json"), 0, "it follows no redirect");
    let brief = Issuer::start(&["auth.jwks_max_outage_ms=0"]).await;
    brief.site.put("jwks.json", "text/plain", "out of order");
    assert_eq!(brief.refused().await, 1013, "the token may be good");
}

#[tokio::test]
async fn a_malformed_key_of_a_set_spoils_no_other() {
    let issuer = Issuer::start(&[]).await;
    let second = issuer.keys.make("second", Algorithm::ES256);
    let good = published(&[("second", Algorithm::ES256, &second.private)]);
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
    let accepted = async { while outcome(&issuer.server, &token("second")).await.is_some() {} };
    in_time("the new key", accepted).await;
    for id in ["short", "empty", "point", "small"] {
        let forged =
            sign(Algorithm::EdDSA, Some(id), &issuer.keys.make(id, Algorithm::EdDSA).private);
        assert_eq!(outcome(&issuer.server, &forged).await.unwrap().0, 4401);
        assert_eq!(outcome(&issuer.server, &token(id)).await.unwrap().0, 4401);
    }
}

#[tokio::test]
async fn a_token_of_an_unknown_key_may_be_good_until_the_keys_are_fetched_again() {
    let issuer =
        Issuer::start(&["auth.jwks_max_age_ms=3000", "auth.jwks_min_refresh_ms=3000"]).await;
    let second = issuer.keys.make("second", Algorithm::ES256);
    let unknown = sign(Algorithm::ES256, Some("second"), &second.private);
    let (code, reason) = outcome(&issuer.server, &unknown).await.unwrap();
    assert_eq!((code, reason.contains("auth.jwks_min_refresh_ms")), (1013, true), "{reason}");
    assert_eq!(issuer.site.served("jwks.json"), 1, "it is too early to fetch them");
    let refused = async {
        loop {
            if let Some((4401, _)) = outcome(&issuer.server, &unknown).await {
                return;
            }
        }
    };
    in_time("the answer of the issuer", refused).await;
    assert_eq!(issuer.site.served("jwks.json"), 2);
}
