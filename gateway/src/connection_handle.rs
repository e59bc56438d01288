//! Handle through which other parts of the gateway control a connection.

use std::{
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
};

use bytes::Bytes;
use futures_util::task::AtomicWaker;
use http::HeaderValue;
use parking_lot::Mutex;
use streamer_auth::{Caller, Principal};
use streamer_core::{CloseCode, Timestamp, Uid};
use streamer_rpc::{CLIENT_ADDRESS, with_authorization};
use streamer_store::Owner;
use tonic::metadata::{Ascii, MetadataValue};

/// Maximum number of pending pushed bytes of a connection. A connection that exceeds it is a slow consumer.
const MAX_PUSHED_BYTES: usize = 1024 * 1024;

/// Shared state of a connection.
pub(crate) struct ConnectionHandle {
    pub(crate) id: Uid,
    pub(crate) remote_address: Option<IpAddr>,
    /// `remote_address` as a metadata value for calls.
    address_value: Option<MetadataValue<Ascii>>,
    pub(crate) user_agent: Box<str>,
    pub(crate) connect_time: Timestamp,
    credentials: Mutex<Caller>,
    pub(crate) waker: AtomicWaker,
    inbox: Mutex<Inbox>,
    pub(crate) liveness: Liveness,
}

/// Liveness of a connection, checked by the registry's sweep. Times are in seconds of the registry's clock.
#[derive(Default)]
pub(crate) struct Liveness {
    /// Time at which the last frame was received.
    pub(crate) last_frame: AtomicU32,
    /// Time at which the last ping was sent.
    pub(crate) last_ping: AtomicU32,
    /// Time since which pending output has made no progress; 0 if it is not blocked.
    pub(crate) blocked_since: AtomicU32,
    /// Whether the gateway reads from the connection. If not, missing frames do not indicate an unresponsive client.
    pub(crate) reading: AtomicBool,
    /// Time since which a message has been incomplete; 0 if no message is incomplete.
    pub(crate) partial_since: AtomicU32,
    /// Time since which the connection has been closing; 0 if it is not closing.
    pub(crate) closing_since: AtomicU32,
    /// Whether the client has been notified that its token expires soon.
    pub(crate) expiry_notified: AtomicBool,
}

/// Pending items for a connection.
#[derive(Default)]
pub(crate) struct Inbox {
    /// Identifiers of the requests with new events.
    pub(crate) ready: Vec<Uid>,
    /// Complete frames to send.
    pub(crate) frames: Vec<Bytes>,
    frame_bytes: usize,
    /// Code and reason of the close frame that follows `frames`.
    pub(crate) close: Option<(CloseCode, String)>,
    /// Whether to drop the connection immediately.
    pub(crate) abort: bool,
}

impl ConnectionHandle {
    pub(crate) fn new(
        id: Uid,
        remote_address: Option<IpAddr>,
        user_agent: String,
        connect_time: Timestamp,
        credentials: Caller,
    ) -> Self {
        Self {
            id,
            remote_address,
            address_value: remote_address.and_then(|address| address.to_string().parse().ok()),
            user_agent: user_agent.into(),
            connect_time,
            credentials: Mutex::new(credentials),
            waker: AtomicWaker::new(),
            inbox: Mutex::default(),
            liveness: Liveness::default(),
        }
    }

    pub(crate) fn principal(&self) -> Arc<Principal> {
        self.credentials.lock().principal.clone()
    }

    /// Returns the tenant and user, which a new token does not change.
    pub(crate) fn owner(&self) -> Owner {
        let principal = self.principal();
        Owner { tenant: principal.tenant.clone(), user: principal.user.clone() }
    }

    pub(crate) fn authorization(&self) -> HeaderValue {
        self.credentials.lock().authorization.clone()
    }

    /// Returns a gRPC request with the user's token.
    pub(crate) fn call<T>(&self, message: T) -> tonic::Request<T> {
        let mut request = with_authorization(message, self.authorization());
        if let Some(address) = &self.address_value {
            request.metadata_mut().insert(CLIENT_ADDRESS, address.clone());
        }
        request
    }

    pub(crate) fn set_credentials(&self, credentials: Caller) {
        *self.credentials.lock() = credentials;
        self.liveness.expiry_notified.store(false, Ordering::Relaxed);
    }

    /// Notifies the connection of new events of the given request.
    pub(crate) fn notify(&self, uid: Uid) {
        self.inbox.lock().ready.push(uid);
        self.waker.wake();
    }

    /// Queues a frame. Closes the connection if too many pushed bytes are pending.
    pub(crate) fn push(&self, frame: Bytes) {
        {
            let mut inbox = self.inbox.lock();
            if inbox.frame_bytes + frame.len() > MAX_PUSHED_BYTES {
                let reason = "slow consumer: too many pushed bytes are pending".to_owned();
                inbox.close.get_or_insert((CloseCode::SlowConsumer, reason));
            } else {
                inbox.frame_bytes += frame.len();
                inbox.frames.push(frame);
            }
        }
        self.waker.wake();
    }

    /// Closes the connection. If it is called repeatedly, the first code and reason apply.
    pub(crate) fn close(&self, code: CloseCode, reason: &str) {
        self.inbox.lock().close.get_or_insert_with(|| (code, reason.to_owned()));
        self.waker.wake();
    }

    /// Drops the connection without a close frame, because the client does not read.
    pub(crate) fn abort(&self) {
        self.inbox.lock().abort = true;
        self.waker.wake();
    }

    /// Removes and returns the pending items. Frames remain pending unless `with_frames` is set.
    pub(crate) fn take_inbox(&self, with_frames: bool) -> Inbox {
        let mut inbox = self.inbox.lock();
        if with_frames {
            return std::mem::take(&mut *inbox);
        }
        Inbox {
            ready: std::mem::take(&mut inbox.ready),
            close: inbox.close.take(),
            abort: inbox.abort,
            ..Inbox::default()
        }
    }
}
