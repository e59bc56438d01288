//! What the suites share: a real server in a process of its own, and clients that check what they
//! are told.

mod browser;
mod client;
pub mod dynamodb;
mod random;
mod server;
mod site;
mod worker;

pub use browser::Browser;
pub use client::{Client, Log};
pub use random::Random;
pub use server::{Server, binary, checker, refusal_to_start, tool};
pub use site::Site;
pub use worker::{ScriptedWorker, WorkerProcess, declare, hello, offered};
