//! Secret with which services authenticate each other.

use std::{fs, path::Path, sync::Arc};

use http::HeaderValue;
use streamer_auth::{create_private_file, warn_if_readable_by_others};
use streamer_core::hex;
use subtle::{Choice, ConstantTimeEq};

const MIN_SECRET_BYTES: usize = 32;
/// Name of the file in the data folder that contains the secret.
const SECRET_FILE: &str = "service-token";

/// Secret that the services share.
#[derive(Clone)]
pub struct ServiceToken {
    /// Secret that this process sends.
    own: HeaderValue,
    /// Secrets that this process accepts: `own` and, during a rotation, others.
    accepted: Arc<[HeaderValue]>,
}

impl ServiceToken {
    /// Loads the secret from `file`. If `file` is empty, loads it from the data folder and creates it if it
    /// does not exist.
    ///
    /// # Errors
    /// Returns the reason if the file cannot be read or created, or a secret in it is malformed.
    pub fn load(file: &str, data: &Path) -> Result<Self, String> {
        if !file.is_empty() {
            return Self::read(Path::new(file));
        }
        let path = data.join(SECRET_FILE);
        let failed = |reason: String| format!("{}: {reason}", path.display());
        if !path.exists() {
            let mut secret = [0; MIN_SECRET_BYTES];
            getrandom::fill(&mut secret).map_err(|error| failed(error.to_string()))?;
            create_private_file(&path, hex(&secret).as_bytes())
                .map_err(|error| failed(error.to_string()))?;
        }
        Self::read(&path)
    }

    fn read(file: &Path) -> Result<Self, String> {
        let failed = |reason: String| format!("{}: {reason}", file.display());
        warn_if_readable_by_others(file);
        let text = fs::read_to_string(file).map_err(|error| failed(error.to_string()))?;
        let mut accepted = Vec::new();
        for secret in text.lines().map(str::trim).filter(|line| !line.is_empty()) {
            if secret.len() < MIN_SECRET_BYTES {
                return Err(failed(format!(
                    "a secret must have at least {MIN_SECRET_BYTES} bytes"
                )));
            }
            let value = HeaderValue::from_str(secret);
            let mut value = value
                .map_err(|_| failed("must contain visible ASCII characters only".to_owned()))?;
            value.set_sensitive(true);
            accepted.push(value);
        }
        let own = accepted.first().cloned().ok_or_else(|| failed("holds no secret".to_owned()))?;
        Ok(Self { own, accepted: accepted.into() })
    }

    /// Returns whether the given secret is accepted. The comparison takes constant time.
    #[must_use]
    pub fn is_accepted(&self, given: &[u8]) -> bool {
        let matches = |secret: &HeaderValue| secret.as_bytes().ct_eq(given);
        self.accepted.iter().map(matches).fold(Choice::from(0), |any, one| any | one).into()
    }
    /// Returns the secret that this process sends.
    pub(crate) fn own(&self) -> HeaderValue {
        self.own.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_can_be_rotated() {
        let data = tempfile::tempdir().unwrap();
        let file = data.path().join("secrets");
        let (new, old) = ("n".repeat(32), "o".repeat(40));
        fs::write(&file, format!("{new}\n\n{old}\n")).unwrap();
        let token = ServiceToken::load(file.to_str().unwrap(), data.path()).unwrap();
        assert_eq!(token.own, new);
        assert!(token.is_accepted(new.as_bytes()) && token.is_accepted(old.as_bytes()));
        assert!(!token.is_accepted("x".repeat(32).as_bytes()) && !token.is_accepted(b""));
        for (text, rule) in [("short\n", "at least 32 bytes"), ("\n", "holds no secret")] {
            fs::write(&file, text).unwrap();
            let error = ServiceToken::load(file.to_str().unwrap(), data.path()).err().unwrap();
            assert!(error.contains(rule), "{error}");
        }
        // The first process creates the secret for all processes.
        let made = ServiceToken::load("", data.path()).unwrap();
        assert!(ServiceToken::load("", data.path()).unwrap().is_accepted(made.own.as_bytes()));
    }
}
