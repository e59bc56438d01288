//! Shared parts of the suites: real servers in separate processes, and clients that check the messages
//! that they receive.

mod browser;
mod client;
mod cluster;
pub mod collector;
pub mod dynamodb;
mod dynamodb_proxy;
mod load;
mod loopback;
mod metrics;
mod process;
mod proxy;
mod random;
mod resharding;
mod server;
mod site;
mod throttle;
mod timeout;
mod worker;

pub use browser::Browser;
pub use client::{Client, Log};
pub use cluster::{Cluster, Service};
pub use load::Load;
pub use loopback::LoopbackAddress;
pub use metrics::{metrics, sum};
pub use process::{Process, Signal};
pub use proxy::Proxy;
pub use random::Random;
pub use resharding::Resharding;
pub use server::{Server, binary, checker, dynamodb_settings, run_tables, start_error, tool};
pub use site::Site;
pub use throttle::{Throttle, Throttling};
pub use timeout::within_timeout;
pub use worker::{
    ScriptedWorker, WorkerProcess, declare, hello, resume_hello, wait_for_action, wait_for_workers,
};
