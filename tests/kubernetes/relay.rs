//! A relay in front of the API server whose line can be cut, and held.

use super::server::Server;
use anyhow::Result;
use std::net::{Ipv4Addr, SocketAddr};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// What becomes of connections.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Line {
    /// They pass.
    Whole,
    /// They end, and new ones get nowhere.
    Cut,
    /// They stay, and new ones are accepted, but nothing passes.
    Held,
}

/// Passes connections on while the line is whole. Ends with the runtime.
pub struct Relay {
    address: SocketAddr,
    line: watch::Sender<Line>,
}

impl Relay {
    /// Begins to listen, with the line whole.
    pub async fn start() -> Result<Self> {
        Self::on(TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?)
    }

    /// The same on a listener of one's own, which may be of another namespace.
    pub fn on(listener: TcpListener) -> Result<Self> {
        let address = listener.local_addr()?;
        let (sender, line) = watch::channel(Line::Whole);
        tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                if *line.borrow() != Line::Cut {
                    tokio::spawn(pass(near, line.clone()));
                }
            }
        });
        Ok(Self { address, line: sender })
    }

    /// The server's address through the relay.
    pub fn url(&self) -> String {
        format!("https://{}", self.address)
    }

    /// Cuts the line: connections end, and new ones get nowhere.
    pub fn cut(&self) {
        self.line.send_replace(Line::Cut);
    }

    /// Holds the line, as a stopped server does, and a load balancer whose server has vanished: connections stay and new ones
    /// are accepted, but nothing passes on any of them, even after [`Self::repair`].
    pub fn hold(&self) {
        self.line.send_replace(Line::Held);
    }

    /// Makes the line whole again, for new connections.
    pub fn repair(&self) {
        self.line.send_replace(Line::Whole);
    }
}

async fn pass(mut near: TcpStream, mut line: watch::Receiver<Line>) {
    let Ok(mut far) = TcpStream::connect(Server::address()).await else { return };
    let is_held = tokio::select! {
        // First, so that nothing passes once the line is held.
        biased;
        state = line.wait_for(|line| *line != Line::Whole) => state.is_ok_and(|line| *line == Line::Held),
        _ = tokio::io::copy_bidirectional(&mut near, &mut far) => return,
    };
    if is_held {
        let _ = line.wait_for(|line| *line == Line::Cut).await;
    }
}
