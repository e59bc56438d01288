//! Server side of WebSocket (RFC 6455).
//!
//! Not a library, because of the requirements of delivery (DESIGN §11): a frame is encoded once
//! however many sockets it is sent to, all pending output of a socket is sent in one vectored
//! write, and an idle connection holds no buffer.

pub(crate) mod decoder;
pub(crate) mod frame;
pub(crate) mod handshake;
pub(crate) mod send_buffer;
