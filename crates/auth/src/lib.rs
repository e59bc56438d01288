//! Tokens: who is calling, and what they may do.
//!
//! [`Authenticator`] verifies JSON Web Tokens against keys that the operator configured: the
//! algorithm belongs to the key and never comes from the token. [`AuthLayer`] puts it in front of
//! a gRPC service; every service has it, so that no hop trusts the one before. What was verified is
//! cached, bounded, until the token expires. No token is ever logged.

mod audit;
mod authenticator;
mod claims;
mod dev_key;
mod jwk;
mod jwks;
mod keys;
mod layer;
mod principal;
mod private_file;
mod unique_json;

pub use audit::{Audit, Subject};
pub use authenticator::{AuthError, Authenticator};
pub use claims::TokenRules;
pub use dev_key::{DEV_AUDIENCE, DEV_ISSUER, DevKey, DevKeyError, NewToken};
pub use jwks::{JwksRefresh, JwksSource};
pub use keys::{KeyError, VerificationKey};
pub use layer::{AuthLayer, AuthService, Caller, caller_of};
pub use principal::{Principal, permissions};
pub use private_file::{create_private_file, warn_if_others_can_read};
