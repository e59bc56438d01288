//! How the rest of the gateway reaches a connection.

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
use streamer_core::{Timestamp, Uid};
use streamer_rpc::{CLIENT_ADDRESS, with_authorization};
use streamer_store::Owner;
use tonic::metadata::{Ascii, MetadataValue};

/// Pushed bytes that wait for a connection at most; beyond that its consumer is too slow.
const MAX_PUSHED_BYTES: usize = 1024 * 1024;

/// Close codes of the protocol (DESIGN §8).
pub(crate) mod close_code {
    pub(crate) const GOING_AWAY: u16 = 1001;
    pub(crate) const POLICY: u16 = 1008;
    pub(crate) const BAD_PROTOCOL: u16 = 4400;
    pub(crate) const UNAUTHENTICATED: u16 = 4401;
    pub(crate) const FORBIDDEN: u16 = 4403;
    pub(crate) const TRY_AGAIN_LATER: u16 = 1013;
    pub(crate) const TOO_SLOW: u16 = 4408;
    pub(crate) const TOO_MANY: u16 = 4429;
}

/// The shared part of a connection.
pub(crate) struct ConnectionHandle {
    pub(crate) id: Uid,
    pub(crate) remote_address: Option<IpAddr>,
    /// The same, for the services that are called for it.
    address_value: Option<MetadataValue<Ascii>>,
    pub(crate) user_agent: Box<str>,
    pub(crate) connect_time: Timestamp,
    credentials: Mutex<Caller>,
    pub(crate) waker: AtomicWaker,
    inbox: Mutex<Inbox>,
    pub(crate) pulse: Pulse,
}

/// Signs of life, in seconds of the registry's count; read by its sweep.
#[derive(Default)]
pub(crate) struct Pulse {
    /// When the last frame came.
    pub(crate) seen: AtomicU32,
    /// When the last ping was sent.
    pub(crate) pinged: AtomicU32,
    /// Since when the socket has taken nothing though something waits; 0 when it is not so.
    pub(crate) blocked_since: AtomicU32,
    /// It reads what comes; otherwise a silence is not the client's.
    pub(crate) reading: AtomicBool,
    /// Since when a message is coming that is not whole; 0 when there is none.
    pub(crate) partial_since: AtomicU32,
    /// Since when the connection is being closed; 0 when it is not.
    pub(crate) closing_since: AtomicU32,
    /// The end of the token was announced.
    pub(crate) expiry_told: AtomicBool,
}

/// What waits for a connection to look at.
#[derive(Default)]
pub(crate) struct Inbox {
    /// Requests with something new.
    pub(crate) ready: Vec<Uid>,
    /// Whole frames.
    pub(crate) frames: Vec<Bytes>,
    frame_bytes: usize,
    /// To be closed with this code and reason, after the frames.
    pub(crate) close: Option<(u16, String)>,
    /// To be dropped as it is.
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
            pulse: Pulse::default(),
        }
    }

    pub(crate) fn principal(&self) -> Arc<Principal> {
        self.credentials.lock().principal.clone()
    }

    /// Tenant and user, which fresh tokens do not change.
    pub(crate) fn owner(&self) -> Owner {
        let principal = self.principal();
        Owner { tenant: principal.tenant.clone(), user: principal.user.clone() }
    }

    pub(crate) fn authorization(&self) -> HeaderValue {
        self.credentials.lock().authorization.clone()
    }

    /// A call in the name of the user.
    pub(crate) fn call<T>(&self, message: T) -> tonic::Request<T> {
        let mut request = with_authorization(message, self.authorization());
        if let Some(address) = &self.address_value {
            request.metadata_mut().insert(CLIENT_ADDRESS, address.clone());
        }
        request
    }

    pub(crate) fn set_credentials(&self, credentials: Caller) {
        *self.credentials.lock() = credentials;
        self.pulse.expiry_told.store(false, Ordering::Relaxed);
    }

    /// There is something new of this request.
    pub(crate) fn ready(&self, uid: Uid) {
        self.inbox.lock().ready.push(uid);
        self.waker.wake();
    }

    /// Queues a frame; a connection that does not take what is pushed is closed.
    pub(crate) fn push(&self, frame: Bytes) {
        {
            let mut inbox = self.inbox.lock();
            if inbox.frame_bytes + frame.len() > MAX_PUSHED_BYTES {
                let reason = "it does not take what is pushed".to_owned();
                inbox.close.get_or_insert((close_code::TOO_SLOW, reason));
            } else {
                inbox.frame_bytes += frame.len();
                inbox.frames.push(frame);
            }
        }
        self.waker.wake();
    }

    /// Closes the connection; the first reason stays.
    pub(crate) fn close(&self, code: u16, reason: &str) {
        self.inbox.lock().close.get_or_insert_with(|| (code, reason.to_owned()));
        self.waker.wake();
    }

    /// Drops the connection without a word: nobody reads there.
    pub(crate) fn abort(&self) {
        self.inbox.lock().abort = true;
        self.waker.wake();
    }

    /// Takes what waits. Frames stay while the connection has enough to write.
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
