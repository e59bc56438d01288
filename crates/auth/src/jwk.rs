//! Validation of one key of a JSON Web Key Set (RFC 7517).

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use ed25519_dalek::VerifyingKey;
use jsonwebtoken::{Algorithm, DecodingKey, crypto};
use serde_json::Value;

use crate::VerificationKey;

/// Allowed sizes of an RSA modulus, in bytes: NIST and RFC 7518 section 3.3 require at least 2048 bits, and the
/// signature library supports at most 4096 bits.
const RSA_BYTES: std::ops::RangeInclusive<usize> = 256..=512;
/// Maximum size of a public exponent, in bytes; in practice, public exponents are 3 to 65537.
const MAX_EXPONENT_BYTES: usize = 4;
const P256_COORDINATE_BYTES: usize = 32;
const ED25519_BYTES: usize = 32;

/// Reason why a key of a set is skipped.
pub(crate) type SkipReason = &'static str;

/// Returns the key if it can verify tokens: RS256, ES256 or EdDSA.
pub(crate) fn verification_key(jwk: &Value) -> Result<VerificationKey, SkipReason> {
    let id = text(jwk, "kid")?.map(str::to_owned);
    if text(jwk, "use")?.is_some_and(|usage| usage != "sig") {
        return Err("use: must be sig");
    }
    match jwk.get("key_ops") {
        None => {}
        Some(Value::Array(operations)) if operations.iter().any(|one| one == "verify") => {}
        Some(_) => return Err("key_ops: must contain verify"),
    }
    let algorithm = text(jwk, "alg")?;
    let is_for = |name: &str| algorithm.is_none_or(|algorithm| algorithm == name);
    let (algorithm, key) = match text(jwk, "kty")? {
        Some("RSA") if is_for("RS256") => (Algorithm::RS256, rsa(jwk)?),
        Some("EC") if is_for("ES256") && text(jwk, "crv")? == Some("P-256") => {
            (Algorithm::ES256, p256(jwk)?)
        }
        Some("OKP") if is_for("EdDSA") || is_for("Ed25519") => (Algorithm::EdDSA, ed25519(jwk)?),
        _ => return Err("must be an RS256, ES256 or EdDSA key"),
    };
    // The library detects some invalid keys only when it verifies a signature, even an invalid one.
    match crypto::verify("", b"", &key, algorithm) {
        Ok(_) => Ok(VerificationKey { id, algorithm, key }),
        Err(_) => Err("is not a valid public key"),
    }
}

fn text<'a>(jwk: &'a Value, name: &str) -> Result<Option<&'a str>, SkipReason> {
    match jwk.get(name) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(_) => Err("kty, alg, use, crv and kid must be strings"),
    }
}

fn bytes(jwk: &Value, name: &str) -> Result<Vec<u8>, SkipReason> {
    let encoded =
        jwk.get(name).and_then(Value::as_str).ok_or("a component of the key is missing")?;
    URL_SAFE_NO_PAD.decode(encoded).map_err(|_| "a component of the key is not base64url")
}

fn rsa(jwk: &Value) -> Result<DecodingKey, SkipReason> {
    let (modulus, exponent) = (bytes(jwk, "n")?, bytes(jwk, "e")?);
    let significant = |bytes: &[u8]| bytes.iter().skip_while(|byte| **byte == 0).count();
    if !RSA_BYTES.contains(&significant(&modulus)) {
        return Err("n: must be 2048 to 4096 bits long");
    }
    if !(1..=MAX_EXPONENT_BYTES).contains(&significant(&exponent)) {
        return Err("e: must be 1 to 4 bytes long");
    }
    Ok(DecodingKey::from_rsa_raw_components(&modulus, &exponent))
}

fn p256(jwk: &Value) -> Result<DecodingKey, SkipReason> {
    let (Some(Value::String(x)), Some(Value::String(y))) = (jwk.get("x"), jwk.get("y")) else {
        return Err("a component of the key is missing");
    };
    for name in ["x", "y"] {
        if bytes(jwk, name)?.len() != P256_COORDINATE_BYTES {
            return Err("x, y: must have 32 bytes");
        }
    }
    DecodingKey::from_ec_components(x, y).map_err(|_| "is not a valid public key")
}

fn ed25519(jwk: &Value) -> Result<DecodingKey, SkipReason> {
    if text(jwk, "crv")? != Some("Ed25519") {
        return Err("crv: must be Ed25519");
    }
    let x: [u8; ED25519_BYTES] =
        bytes(jwk, "x")?.try_into().map_err(|_| "x: must have 32 bytes")?;
    match VerifyingKey::from_bytes(&x) {
        // With a key of small order, an attacker can forge signatures that verify for any message.
        Ok(key) if key.is_weak() => Err("x: is a point of small order"),
        Ok(_) => Ok(DecodingKey::from_ed_der(&x)),
        Err(_) => Err("x: is not a point on the curve"),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    // RFC 8037, appendix A.2.
    const ED25519_X: &str = "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo";
    // RFC 7515, appendix A.3.
    const P256_X: &str = "f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU";
    const P256_Y: &str = "x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0";

    fn ed25519_key() -> Value {
        json!({"kty": "OKP", "crv": "Ed25519", "x": ED25519_X, "kid": "one"})
    }

    fn p256_key() -> Value {
        json!({"kty": "EC", "crv": "P-256", "x": P256_X, "y": P256_Y})
    }

    fn rsa_key(bytes: usize, exponent: &[u8]) -> Value {
        let mut modulus = vec![0xff; bytes];
        modulus[0] = 0x80;
        let encode = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
        json!({"kty": "RSA", "n": encode(&modulus), "e": encode(exponent)})
    }

    fn reason(jwk: &Value) -> Option<SkipReason> {
        verification_key(jwk).err()
    }

    fn with(mut jwk: Value, name: &str, value: Value) -> Value {
        jwk[name] = value;
        jwk
    }

    #[test]
    fn every_supported_key_type_is_accepted() {
        for (jwk, algorithm) in [
            (ed25519_key(), Algorithm::EdDSA),
            (p256_key(), Algorithm::ES256),
            (rsa_key(256, &[1, 0, 1]), Algorithm::RS256),
            (rsa_key(512, &[3]), Algorithm::RS256),
        ] {
            assert_eq!(verification_key(&jwk).ok().unwrap().algorithm, algorithm, "{jwk}");
        }
        let named = with(ed25519_key(), "alg", "Ed25519".into());
        assert_eq!(verification_key(&named).ok().unwrap().id.as_deref(), Some("one"));
        let both = with(ed25519_key(), "key_ops", json!(["sign", "verify"]));
        assert_eq!(reason(&both), None);
        assert_eq!(reason(&with(ed25519_key(), "use", "sig".into())), None);
    }

    #[test]
    fn keys_for_other_purposes_are_skipped() {
        for (name, value) in [
            ("use", json!("enc")),
            ("use", json!(["sig"])),
            ("key_ops", json!(["sign"])),
            ("key_ops", json!([])),
            ("key_ops", json!("verify")),
            ("alg", json!("HS256")),
            ("alg", json!("none")),
            ("alg", json!(5)),
            ("kid", json!(5)),
            ("kty", json!("oct")),
            ("kty", json!(null)),
        ] {
            for jwk in [ed25519_key(), p256_key(), rsa_key(256, &[1, 0, 1])] {
                let jwk = with(jwk, name, value.clone());
                assert!(reason(&jwk).is_some(), "{jwk}");
            }
        }
        for jwk in [json!(null), json!([]), json!("key"), json!({})] {
            assert!(reason(&jwk).is_some(), "{jwk}");
        }
    }

    #[test]
    fn malformed_keys_are_skipped() {
        let encode = |bytes: &[u8]| json!(URL_SAFE_NO_PAD.encode(bytes));
        let mut identity = [0; 32];
        identity[0] = 1;
        for x in [
            encode(&[]),
            encode(&[7; 31]),
            encode(&[7; 33]),
            // Points of small order.
            encode(&identity),
            encode(&[0; 32]),
            // No point on the curve has y = 2.
            encode(&[[2].as_slice(), &[0; 31]].concat()),
            json!("not base64url!"),
            json!(5),
            json!(null),
        ] {
            assert!(reason(&with(ed25519_key(), "x", x.clone())).is_some(), "{x}");
        }
        assert!(reason(&with(ed25519_key(), "crv", "X25519".into())).is_some());
        assert!(reason(&with(ed25519_key(), "crv", "Ed448".into())).is_some());
        for (name, value) in [
            ("x", json!(P256_Y)),
            ("y", encode(&[7; 31])),
            ("y", encode(&[7; 33])),
            ("x", encode(&[])),
            ("x", json!(5)),
            ("crv", json!("P-384")),
            ("crv", json!("secp256k1")),
        ] {
            let jwk = with(p256_key(), name, value);
            assert!(reason(&jwk).is_some(), "{jwk}");
        }
        for (size, exponent) in
            [(128, &[1, 0, 1][..]), (255, &[1, 0, 1]), (513, &[3]), (256, &[]), (256, &[1; 5])]
        {
            assert!(reason(&rsa_key(size, exponent)).is_some(), "{size} {exponent:?}");
        }
    }
}
