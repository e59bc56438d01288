//! Server side of WebSocket (RFC 6455).
//!
//! The gateway does not use a library, because of the requirements of event delivery: a frame is encoded
//! once for any number of sockets, all pending output of a socket is sent in one vectored write, and an
//! idle connection has no buffer. See `docs/adr/0001-our-own-websocket-framing.md`.

pub(crate) mod decoder;
pub(crate) mod frame;
pub(crate) mod handshake;
pub(crate) mod send_buffer;
