//! How services in separate processes find, authenticate and call each other: the table of calls between
//! services, discovery, client-side load balancing, and the service token.

mod discovery;
mod instance;
mod load_balancer;
mod peers;
mod service;
mod service_auth;
mod service_token;

pub use discovery::MAX_HTTP2_WINDOW;
pub use instance::{Instance, Instances};
pub use load_balancer::{RouteKey, is_safe_to_retry, with_route};
pub use peers::Peers;
pub use service::{Call, Need, Service};
pub use service_auth::{FromService, services_only, strip_untrusted_headers};
pub use service_token::ServiceToken;
