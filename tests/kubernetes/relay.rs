//! A relay in front of the API server whose line can be cut.

use super::server::Server;
use anyhow::Result;
use std::net::{Ipv4Addr, SocketAddr};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// Passes connections on while the line is whole. Ends with the runtime.
pub struct Relay {
    address: SocketAddr,
    whole: watch::Sender<bool>,
}

impl Relay {
    /// Begins to listen, with the line whole.
    pub async fn start() -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let (whole, line) = watch::channel(true);
        tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                if *line.borrow() {
                    tokio::spawn(pass(near, line.clone()));
                }
            }
        });
        Ok(Self { address, whole })
    }

    /// The server's address through the relay.
    pub fn url(&self) -> String {
        format!("https://{}", self.address)
    }

    /// Cuts the line: connections end, and new ones get nowhere.
    pub fn cut(&self) {
        self.whole.send_replace(false);
    }

    /// Makes the line whole again.
    pub fn repair(&self) {
        self.whole.send_replace(true);
    }
}

async fn pass(mut near: TcpStream, mut line: watch::Receiver<bool>) {
    let Ok(mut far) = TcpStream::connect(Server::address()).await else { return };
    tokio::select! {
        _ = tokio::io::copy_bidirectional(&mut near, &mut far) => {}
        _ = line.wait_for(|whole| !whole) => {}
    }
}
