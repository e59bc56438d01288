//! What the suites share: a real server in a process of its own, and clients that check what they
//! receive.

mod browser;
mod client;
mod cluster;
pub mod collector;
pub mod dynamodb;
mod front;
mod load;
mod loopback;
mod metrics;
mod patience;
mod process;
mod proxy;
mod random;
mod resharding;
mod server;
mod site;
mod throttle;
mod worker;

pub use browser::Browser;
pub use client::{Client, Log};
pub use cluster::{Cluster, Service};
pub use load::Load;
pub use loopback::LoopbackAddress;
pub use metrics::metrics;
pub use patience::in_time;
pub use process::{Process, Signal};
pub use proxy::Proxy;
pub use random::Random;
pub use resharding::Resharding;
pub use server::{Server, binary, checker, dynamodb_settings, refusal_to_start, tables, tool};
pub use site::Site;
pub use throttle::{Throttle, Throttling};
pub use worker::{ScriptedWorker, WorkerProcess, declare, hello, hello_again, offered, offered_at};
