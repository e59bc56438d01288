//! Authentication and authorization: token verification, permissions, audit log.
//!
//! [`Authenticator`] verifies JSON Web Tokens against keys that the operator configures: the
//! algorithm belongs to the key and is never chosen by the token. [`AuthLayer`] wraps a gRPC service
//! with it; every service is wrapped, so that no hop trusts the previous hop. Verified tokens are
//! cached until they expire, in a bounded cache. No token is ever logged.

mod audit;
mod authenticator;
mod caller;
mod claims;
mod dev_key;
mod error;
mod jwk;
mod jwks;
mod keys;
mod layer;
mod principal;
mod private_file;
mod unique_json;

pub use audit::{Audit, Subject};
pub use authenticator::Authenticator;
pub use caller::Caller;
pub use claims::TokenRules;
pub use dev_key::{DEV_AUDIENCE, DEV_ISSUER, DevKey, DevKeyError, NewToken};
pub use error::AuthError;
pub use jwks::{JwksRefresh, JwksSource};
pub use keys::{KeyError, VerificationKey};
pub use layer::{AuthLayer, AuthService, caller_of};
pub use principal::{Principal, permissions};
pub use private_file::{create_private_file, warn_if_readable_by_others};
