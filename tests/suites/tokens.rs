//! Matrix of tokens: each row of `tokens.json` describes a token and its expected outcome over gRPC and over
//! WebSocket. A row has the following members:
//!
//! - `server`: see [`Scene::start`]; default `keys`. `key`: see [`Keys::new`]; `none` means an empty signature;
//!   default `ed25519`. `signed`: the algorithm of the signature; default that of the key.
//! - `header`, `claims`: members to set, see [`Scene::value`]. `…_without`: members to omit.
//! - `…_text`: the JSON text, in which `$MEMBERS` is replaced with the members and `$EXP` with a time in the
//!   future. `…_encoding`: see [`encoded`]. `…_part`: the complete segment.
//! - `edits`: changes after signing, see [`Scene::edit`]. `size`: the expected length of the token.
//! - `expected`: `accepted`, or a part of the message with the violated rule. `lists_connections`: whether
//!   the accepted token has permission `connections:read`.
#![allow(clippy::unwrap_used, reason = "in tests, a panic is the report")]

use std::collections::{BTreeSet, HashMap};
use std::fs;

use base64::{
    Engine,
    engine::general_purpose::{STANDARD, STANDARD_NO_PAD, URL_SAFE, URL_SAFE_NO_PAD},
};
use futures_util::{StreamExt, stream};
use jsonwebtoken::{Algorithm, EncodingKey, crypto, jwk::Jwk};
use serde_json::{Value, json};
use streamer_client::{Api, ClientError};
use streamer_core::{Clock, SystemClock};
use streamer_proto::{connections::v1::ListRequest, router::v1::ListActionsRequest};
use streamer_tests::{Client, Process, Server, Site};
use tempfile::TempDir;
use tonic::{Code, Request, Status};

const MEMBERS: &str = "name server key signed header header_without header_text header_part \
                       header_encoding claims claims_without claims_text claims_part \
                       claims_encoding edits size lists_connections expected";
const SECRET: &[u8] = b"0123456789abcdef0123456789abcdef";

fn rows() -> Vec<Value> {
    serde_json::from_str(include_str!("tokens.json")).unwrap()
}

#[test]
fn the_matrix_has_at_least_250_rows_with_unique_names_and_known_members() {
    let (rows, members) = (rows(), MEMBERS.split(' ').collect::<BTreeSet<_>>());
    assert!(rows.len() >= 250, "{}", rows.len());
    let mut names = BTreeSet::new();
    for row in &rows {
        assert!(names.insert(row["name"].as_str().unwrap()), "two rows have the name of {row}");
        assert!(row["expected"].is_string(), "{row}");
        let unknown = row.as_object().unwrap().keys().find(|name| !members.contains(&***name));
        assert_eq!(unknown, None, "{row}");
    }
}

#[tokio::test]
async fn each_token_gets_the_expected_outcome() {
    let (scene, rows) = (Scene::start().await, rows());
    let differences = stream::iter(&rows).map(|row| scene.differences(row));
    let differences = differences.buffered(16).concat().await;
    assert!(differences.is_empty(), "unexpected outcomes:\n{}", differences.join("\n"));
    assert_eq!(scene.site.fetches("foreign.json"), 0, "a server fetched a URL from a token");
}

struct Keys {
    folder: TempDir,
    by_name: HashMap<String, (Algorithm, EncodingKey)>,
}

impl Keys {
    /// Generates key pairs with OpenSSL, and derives shared secrets from the public keys, as an attacker would.
    fn new() -> Self {
        let folder = TempDir::with_prefix("streamer-tokens-").unwrap();
        let mut keys = Self { folder, by_name: HashMap::new() };
        for (name, algorithm, kind) in [
            ("ed25519", Algorithm::EdDSA, "ED25519"),
            ("rsa", Algorithm::RS256, "RSA -pkeyopt rsa_keygen_bits:2048"),
            ("p256", Algorithm::ES256, "EC -pkeyopt ec_paramgen_curve:P-256"),
        ] {
            keys.generate(name, algorithm, kind);
            keys.generate(&format!("foreign {name}"), algorithm, kind);
        }
        for name in ["ed25519", "rsa", "p256"] {
            let pem = fs::read_to_string(keys.path(name, "pub")).unwrap();
            let body: String = pem.lines().filter(|line| !line.starts_with('-')).collect();
            keys.share(&format!("{name} DER"), &STANDARD.decode(body).unwrap());
            keys.share(&format!("{name} PEM"), pem.as_bytes());
            keys.share(&format!("{name} PEM without its final newline"), pem.trim_end().as_bytes());
            keys.share(&format!("{name} JWK"), keys.jwk(name).to_string().as_bytes());
        }
        fs::write(keys.path("secret", "pub"), SECRET).unwrap();
        keys.share("secret", SECRET);
        keys.share("secret with a newline", &[SECRET, b"\n"].concat());
        keys.share("half of the secret", &SECRET[..16]);
        keys.share("empty secret", b"");
        keys.share("foreign secret", b"a different secret of 32 or more bytes");
        keys
    }

    fn generate(&mut self, name: &str, algorithm: Algorithm, kind: &str) {
        let (private, public) = (self.path(name, "pem"), self.path(name, "pub"));
        let kind: Vec<_> = kind.split(' ').collect();
        openssl(&[&["genpkey", "-out", &private, "-algorithm"], &*kind].concat());
        openssl(&["pkey", "-in", &private, "-pubout", "-out", &public]);
        let pem = fs::read(private).unwrap();
        let private = match algorithm {
            Algorithm::EdDSA => EncodingKey::from_ed_pem(&pem),
            Algorithm::RS256 => EncodingKey::from_rsa_pem(&pem),
            _ => EncodingKey::from_ec_pem(&pem),
        };
        self.by_name.insert(name.into(), (algorithm, private.unwrap()));
    }

    fn share(&mut self, name: &str, secret: &[u8]) {
        self.by_name.insert(name.into(), (Algorithm::HS256, EncodingKey::from_secret(secret)));
    }

    fn path(&self, name: &str, extension: &str) -> String {
        self.folder.path().join(format!("{name}.{extension}")).to_str().unwrap().into()
    }

    fn jwk(&self, name: &str) -> Value {
        let (algorithm, private) = &self.by_name[name];
        let mut jwk = Jwk::from_encoding_key(private, *algorithm).unwrap();
        jwk.common.key_id = Some(format!("{name}-1"));
        serde_json::to_value(jwk).unwrap()
    }
}

fn openssl(arguments: &[&str]) {
    let output = Process::output(Process::command("openssl").args(arguments));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// Outcome of a token: tenant and user if it is accepted, code and message if it is rejected.
type Outcome = Result<(String, String), (String, String)>;

struct Scene {
    keys: Keys,
    site: Site,
    servers: HashMap<&'static str, (Api, Server)>,
}

impl Scene {
    /// Starts the servers: `keys` with one key per algorithm and the maximum leeway, `set` with a key set
    /// at a URL, `options` with one key, different claim names, two tenants and no leeway.
    async fn start() -> Self {
        let (keys, site) = (Keys::new(), Site::start().await);
        let set = |names: &[&str]| {
            json!({"keys": names.iter().map(|name| keys.jwk(name)).collect::<Value>()}).to_string()
        };
        site.put("jwks.json", "application/json", set(&["ed25519", "rsa", "p256"]));
        site.put("foreign.json", "application/json", set(&["foreign ed25519"]));
        let file = |algorithm: &str, name: &str| format!("{algorithm}:{}", keys.path(name, "pub"));
        let ed25519 = file("EdDSA", "ed25519");
        let others = [file("RS256", "rsa"), file("ES256", "p256"), file("HS256", "secret")];
        let start = |settings: String| {
            let common = "auth.issuers=https://issuer.example,https://second.example \
                          auth.audiences=streamer,https://streamer.example";
            let settings: Vec<_> = settings.split(' ').chain(common.split(' ')).collect();
            let server = Server::start(&settings);
            (Api::new(&server.url, "").unwrap(), server)
        };
        let several = format!("auth.keys={ed25519},{} auth.leeway=300000ms", others.join(","));
        let set = format!(
            "auth.jwks_url={}/jwks.json auth.jwks_min_refresh_interval=0ms \
             auth.permissions_claim=realm_access.roles",
            site.url
        );
        let options = format!(
            "auth.keys={ed25519} auth.tenants=acme,globex auth.tenant_claim=org.id \
             auth.permissions_claim=scope auth.leeway=0ms auth.max_token_bytes=12288"
        );
        let servers = [("keys", several), ("set", set), ("options", options)];
        let servers = servers.map(|(name, settings)| (name, start(settings))).into();
        Self { keys, site, servers }
    }

    /// Tries a token; returns the outcomes that differ from the expected outcome.
    async fn differences(&self, row: &Value) -> Vec<String> {
        let expected = row["expected"].as_str().unwrap();
        let (api, Server { url, .. }) = &self.servers[row["server"].as_str().unwrap_or("keys")];
        let token = self.token(row);
        let outcomes = if token.contains(|character: char| character.is_control()) {
            // A header cannot contain this token, but a message can.
            let valid = self.token(&json!({"server": row["server"]}));
            vec![("auth message", "UNAUTHORIZED", in_message(url, &valid, &token).await)]
        } else {
            vec![
                ("gRPC", "Unauthenticated", self.over_grpc(row, api, &token).await),
                ("WebSocket", "4401", over_websocket(url, &token).await),
            ]
        };
        let differing = outcomes.into_iter().filter(|(_, rejection_code, outcome)| match outcome {
            Ok(owner) => expected != "accepted" || *owner != self.owner(row),
            Err((code, message)) => code != rejection_code || !message.contains(expected),
        });
        let name = &row["name"];
        let report = |(transport, _, outcome)| {
            format!("{name} over {transport}: {outcome:?}, not {expected:?}")
        };
        differing.map(report).collect()
    }

    async fn over_grpc(&self, row: &Value, api: &Api, token: &str) -> Outcome {
        let rejection = |status: Status| (format!("{:?}", status.code()), status.message().into());
        api.router().list_actions(call(ListActionsRequest {}, token)).await.map_err(rejection)?;
        let Some(permitted) = row["lists_connections"].as_bool() else {
            return Ok(self.owner(row));
        };
        let listed = api.connections().list(call(ListRequest::default(), token)).await;
        let code = listed.err().map_or(Code::Ok, |status| status.code());
        let is_expected = code == if permitted { Code::Ok } else { Code::PermissionDenied };
        is_expected.then(|| self.owner(row)).ok_or_else(|| ("List".into(), format!("{code:?}")))
    }

    /// Returns the tenant and the user of an accepted token.
    fn owner(&self, row: &Value) -> (String, String) {
        let claim = |pointer: &str, default: &str| {
            let value = row.pointer(pointer).map(|value| self.value(value));
            value.as_ref().and_then(Value::as_str).unwrap_or(default).to_owned()
        };
        let tenant = if row["server"] == "options" { "org/id" } else { "tenant_id" };
        (claim(&format!("/claims/{tenant}"), "acme"), claim("/claims/sub", "ann"))
    }

    fn token(&self, row: &Value) -> String {
        let key = row["key"].as_str().unwrap_or("ed25519");
        let key = (key != "none").then(|| &self.keys.by_name[key]);
        let algorithm = key.map_or("none".into(), |(algorithm, _)| format!("{algorithm:?}"));
        let header = self.changed(row, "header", json!({"alg": algorithm, "typ": "JWT"}));
        let claims = json!({"iss": "https://issuer.example", "aud": "streamer", "sub": "ann",
            "tenant_id": "acme", "org": {"id": "acme"}, "iat": now(), "exp": now() + 600});
        let claims = self.changed(row, "claims", claims);
        let signed = format!("{}.{}", part(row, "header", &header), part(row, "claims", &claims));
        let signature = key.map_or(String::new(), |(algorithm, private)| {
            let algorithm = row["signed"].as_str().map_or(*algorithm, |name| name.parse().unwrap());
            crypto::sign(signed.as_bytes(), private, algorithm).unwrap()
        });
        let edits = row["edits"].as_array().into_iter().flatten();
        let token = edits.fold(format!("{signed}.{signature}"), |token, edit| {
            let (name, argument) = (edit[0].as_str().unwrap(), self.value(&edit[1]));
            self.edit(&token, name, &argument, edit[2].as_str().unwrap_or_default())
        });
        assert!(row["size"].is_null() || number(&row["size"]) == token.len(), "{}", token.len());
        token
    }

    /// Sets and removes the members that a row names.
    fn changed(&self, row: &Value, what: &str, mut members: Value) -> Value {
        for (name, value) in row[what].as_object().into_iter().flatten() {
            members[name] = self.value(value);
        }
        for name in row[format!("{what}_without")].as_array().into_iter().flatten() {
            members.as_object_mut().unwrap().remove(name.as_str().unwrap()).unwrap();
        }
        members
    }

    /// Evaluates a value of a row: replaces a `$` member with the value that it describes.
    fn value(&self, value: &Value) -> Value {
        let members = match value {
            Value::Array(items) => return items.iter().map(|item| self.value(item)).collect(),
            Value::Object(members) if members.len() == 1 => members,
            other => return other.clone(),
        };
        let (name, argument) = members.iter().next().unwrap();
        let text = argument.as_str().unwrap_or_default();
        match name.as_str() {
            "$now" => match argument.as_i64() {
                Some(offset) => json!(now() + offset),
                None => {
                    json!(f64::from(u32::try_from(now()).unwrap()) + argument.as_f64().unwrap())
                }
            },
            "$repeat" => argument[0].as_str().unwrap().repeat(number(&argument[1])).into(),
            "$deep" => (0..number(argument)).fold(json!(1), |inner, _| json!([inner])),
            "$jwk" => self.keys.jwk(text),
            "$site" => format!("{}/{text}", self.site.url).into(),
            _ => json!({ name: self.value(argument) }),
        }
    }

    /// Changes the text, the segments or the signature of a signed token.
    fn edit(&self, token: &str, edit: &str, argument: &Value, second: &str) -> String {
        let mut segments: Vec<_> = token.split('.').map(str::to_owned).collect();
        let text = argument.as_str().unwrap_or_default();
        match edit {
            "is" => return text.into(),
            "append" => return format!("{token}{text}"),
            "prepend" => return format!("{text}{token}"),
            "replace" => return token.replace(text, second),
            "segments" => {
                let order = argument.as_array().unwrap().iter();
                segments = order.map(|at| segments[number(at)].clone()).collect();
            }
            // Sets members of the signed header, or of the signed claims.
            "header" | "claims" => {
                let segment = &mut segments[usize::from(edit == "claims")];
                let signed = URL_SAFE_NO_PAD.decode(&*segment).unwrap();
                let signed = serde_json::from_slice(&signed).unwrap();
                let changed = self.changed(&json!({ edit: argument }), edit, signed);
                *segment = URL_SAFE_NO_PAD.encode(changed.to_string());
            }
            "signature" => segments[2] = text.into(),
            other => segments[2] = edit_signature(&segments[2], other, argument),
        }
        segments.join(".")
    }
}

fn call<T>(message: T, token: &str) -> Request<T> {
    let mut request = Request::new(message);
    if !token.is_empty() {
        let value = format!("Bearer {token}").into_bytes().try_into().unwrap();
        request.metadata_mut().insert("authorization", value);
    }
    request
}

async fn over_websocket(url: &str, token: &str) -> Outcome {
    match Client::try_connect(url, token).await {
        Ok(Client { connected, .. }) => {
            let text = |name: &str| connected[name].as_str().unwrap().to_owned();
            Ok((text("tenant_id"), text("user_id")))
        }
        Err(ClientError::Closed { code, reason }) => Err((code.to_string(), reason)),
        Err(other) => Err((String::new(), other.to_string())),
    }
}

/// Sends a token in an `auth` message on a connection that a valid token opened.
async fn in_message(url: &str, valid: &str, token: &str) -> Outcome {
    let mut client = Client::connect(url, valid).await;
    let reply = client.request(json!({"type": "auth", "token": token})).await;
    let code = reply["error"]["code"].as_str().unwrap_or_default();
    Err((code.into(), reply.to_string()))
}

fn now() -> i64 {
    SystemClock.now().as_millis() / 1000
}

fn number(value: &Value) -> usize {
    usize::try_from(value.as_u64().unwrap()).unwrap()
}

/// Returns the segment of the header or of the claims.
fn part(row: &Value, what: &str, members: &Value) -> String {
    let given = |name: &str| row[format!("{what}_{name}")].as_str();
    if let Some(part) = given("part") {
        return part.into();
    }
    let json = members.to_string();
    let text = given("text").unwrap_or("{$MEMBERS}").replace("$MEMBERS", &json[1..json.len() - 1]);
    let text = text.replace("$EXP", &(now() + 600).to_string());
    encoded(text.as_bytes(), given("encoding").unwrap_or_default())
}

/// Encodes bytes in base64 as defined by RFC 7515 if `form` is empty, otherwise in the given form.
fn encoded(bytes: &[u8], form: &str) -> String {
    let valid = URL_SAFE_NO_PAD.encode(bytes);
    let encoded = match form {
        "" => return valid,
        "padded" => URL_SAFE.encode(bytes),
        "standard" => STANDARD_NO_PAD.encode(bytes),
        // Sets a bit in the last character that is not part of any byte.
        "spare bit" => {
            assert_ne!(valid.len() % 4, 0, "the text has no spare bits");
            let (rest, last) = valid.split_at(valid.len() - 1);
            format!("{rest}{}", char::from(last.as_bytes()[0] + 1))
        }
        other => panic!("unknown encoding {other}"),
    };
    assert_ne!(encoded, valid, "{form}: the encoding does not differ");
    encoded
}

/// Changes the bytes of a signature, or their encoding.
fn edit_signature(signature: &str, edit: &str, argument: &Value) -> String {
    let mut bytes = URL_SAFE_NO_PAD.decode(signature).unwrap();
    match edit {
        "encoding" => return encoded(&bytes, argument.as_str().unwrap()),
        "flip" => bytes[number(argument)] ^= 1,
        "truncate" => bytes.truncate(number(argument)),
        "zeros after" => bytes.extend(vec![0; number(argument)]),
        "zeros before" => bytes.splice(..0, vec![0; number(argument)]).for_each(drop),
        "rotate" => bytes.rotate_left(number(argument)),
        "ASN.1" => bytes = [&[48, 70, 2, 33, 0], &bytes[..32], &[2, 33, 0], &bytes[32..]].concat(),
        "add the order" => add_order(&mut bytes[32..]),
        other => panic!("unknown edit {other}"),
    }
    URL_SAFE_NO_PAD.encode(bytes)
}

/// Adds the order of the Ed25519 group to `s`: a second representation, which RFC 8032 forbids.
fn add_order(s: &mut [u8]) {
    let order = [0x14de_f9de_a2f7_9cd6_5812_631a_5cf5_d3ed_u128, 1 << 124];
    let mut carry = 0;
    for (byte, other) in s.iter_mut().zip(order.map(u128::to_le_bytes).as_flattened()) {
        [*byte, carry] = (u16::from(*byte) + u16::from(*other) + u16::from(carry)).to_le_bytes();
    }
}
