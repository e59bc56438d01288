//! WebSocket, RFC 6455, server side.
//!
//! Our own and not a library's because of what delivery needs (DESIGN §11): a frame is encoded once
//! however many sockets it goes to, everything that waits for a socket leaves in one vectored
//! write, and an idle connection holds no buffer at all.

pub(crate) mod decoder;
pub(crate) mod frame;
pub(crate) mod handshake;
pub(crate) mod outbox;
