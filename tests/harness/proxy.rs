//! A TCP proxy that can be paused. While it is paused, it forwards no data and closes no connection.

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
    /// Address on which the proxy listens.
    pub address: SocketAddr,
    running: watch::Sender<bool>,
}

impl Proxy {
    /// Starts a proxy on `address` that forwards connections to `target`, which may start later.
    ///
    /// # Panics
    /// Panics if the address is in use.
    pub async fn start(address: SocketAddr, target: SocketAddr) -> Self {
        let listener = TcpListener::bind(address).await.expect("the address is free");
        let (running, is_running) = watch::channel(true);
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let is_running = is_running.clone();
                tokio::spawn(async move {
                    // The connection waits, like a connection to a host that does not respond.
                    let mut resumed = is_running.clone();
                    if resumed.wait_for(|running| *running).await.is_err() {
                        return;
                    }
                    let Ok(server) = TcpStream::connect(target).await else { return };
                    // Without this, every exchange would wait 40 ms for a delayed acknowledgment.
                    if client.set_nodelay(true).and_then(|()| server.set_nodelay(true)).is_err() {
                        return;
                    }
                    let ((from_client, to_client), (from_server, to_server)) =
                        (client.into_split(), server.into_split());
                    tokio::spawn(forward(from_client, to_server, is_running.clone()));
                    forward(from_server, to_client, is_running).await;
                });
            }
        });
        Self { address, running }
    }

    /// Stops forwarding data.
    pub fn pause(&self) {
        self.running.send_replace(false);
    }

    /// Resumes forwarding, including data that arrived during the pause.
    pub fn resume(&self) {
        self.running.send_replace(true);
    }
}

async fn forward(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut is_running: watch::Receiver<bool>,
) {
    let mut bytes = vec![0; 16 * 1024];
    while let Ok(count) = from.read(&mut bytes).await {
        if is_running.wait_for(|running| *running).await.is_err() {
            return;
        }
        if count == 0 || to.write_all(&bytes[..count]).await.is_err() {
            return;
        }
    }
}
