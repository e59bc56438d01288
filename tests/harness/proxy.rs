//! A TCP proxy that can be cut: then nothing gets through in either direction, and no end is notified.

use std::net::SocketAddr;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::watch,
};

/// A running proxy.
pub struct Proxy {
    /// Where it listens.
    pub address: SocketAddr,
    open: watch::Sender<bool>,
}

impl Proxy {
    /// Starts one on `address` in front of `target`, which may start later.
    ///
    /// # Panics
    /// When the address is in use.
    pub async fn start(address: SocketAddr, target: SocketAddr) -> Self {
        let listener = TcpListener::bind(address).await.expect("the address is free");
        let (open, is_open) = watch::channel(true);
        tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                let is_open = is_open.clone();
                tokio::spawn(async move {
                    // Like a host that does not answer: the connection waits.
                    let mut wait = is_open.clone();
                    if wait.wait_for(|open| *open).await.is_err() {
                        return;
                    }
                    let Ok(far) = TcpStream::connect(target).await else { return };
                    // What comes is passed on at once, or every exchange would wait for an
                    // acknowledgement that is held back for 40 ms.
                    if near.set_nodelay(true).and_then(|()| far.set_nodelay(true)).is_err() {
                        return;
                    }
                    let ((near_in, near_out), (far_in, far_out)) =
                        (near.into_split(), far.into_split());
                    tokio::spawn(carry(near_in, far_out, is_open.clone()));
                    carry(far_in, near_out, is_open).await;
                });
            }
        });
        Self { address, open }
    }

    /// Lets nothing through from now on.
    pub fn cut(&self) {
        self.open.send_replace(false);
    }

    /// Lets everything through again, also what was held back.
    pub fn mend(&self) {
        self.open.send_replace(true);
    }
}

async fn carry(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut open: watch::Receiver<bool>) {
    let mut bytes = vec![0; 16 * 1024];
    while let Ok(count) = from.read(&mut bytes).await {
        if open.wait_for(|open| *open).await.is_err() {
            return;
        }
        if count == 0 || to.write_all(&bytes[..count]).await.is_err() {
            return;
        }
    }
}
