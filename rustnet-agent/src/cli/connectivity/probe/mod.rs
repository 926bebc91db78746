//! `rustnetctl connectivity-probe`: what runs in the pods of `rustnetctl connectivity`: a server that echoes, and a client that
//! does what it is asked to by HTTP.

mod client;
mod echo;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinSet;

use super::wire::{HEALTH_PATH, PATH, Question, TOKEN_HEADER};
use crate::http;

/// What askers are granted: more than the longest question takes.
const LIMITS: http::Limits = http::Limits { whole: Duration::from_secs(20), ..http::LIMITS };

/// Options.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The name by which it answers
    #[arg(long)]
    name: String,
    /// The addresses to serve at: those of the pod, and no others, so that answers come from where they were asked
    #[arg(long, value_delimiter = ',', required = true)]
    addresses: Vec<IpAddr>,
    /// TCP port of questions; TCP and UDP echo at the next one
    #[arg(long)]
    port: u16,
    /// The secret of those who may ask
    #[arg(long, env = "PROBE_TOKEN", hide_env_values = true)]
    token: String,
}

/// Serves until SIGTERM.
///
/// # Errors
/// An address or port that cannot be had.
pub fn run(args: &Args) -> Result<()> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start a runtime")?;
    runtime.block_on(async {
        let mut servers = start(args).await?;
        // Process 1 of a container has no default action for signals.
        let mut end = signal(SignalKind::terminate()).context("cannot wait for SIGTERM")?;
        tokio::select! {
            _ = end.recv() => {}
            _ = servers.join_next() => {}
        }
        Ok(())
    })
}

/// Starts all servers.
async fn start(args: &Args) -> Result<JoinSet<()>> {
    let mut servers = JoinSet::new();
    let echo_port =
        args.port.checked_add(1).context("--port 65535: give a smaller one, the next one is needed, too")?;
    let asking = Arc::new(Asking { token: args.token.clone() });
    for address in &args.addresses {
        echo::start(&args.name, SocketAddr::new(*address, echo_port), &mut servers).await?;
        let own = SocketAddr::new(*address, args.port);
        let listener = http::bind(own).with_context(|| format!("{own}: cannot listen; choose another --port"))?;
        servers.spawn(http::serve_on(listener, router(Arc::clone(&asking)), LIMITS));
    }
    Ok(servers)
}

struct Asking {
    token: String,
}

fn router(asking: Arc<Asking>) -> Router {
    Router::new().route(HEALTH_PATH, get(|| async { "ok\n" })).route(PATH, get(answer)).with_state(asking)
}

async fn answer(State(asking): State<Arc<Asking>>, headers: HeaderMap, uri: Uri) -> Response {
    let token = headers.get(TOKEN_HEADER).and_then(|value| value.to_str().ok());
    if token != Some(&asking.token) {
        return (StatusCode::FORBIDDEN, "another run's probe\n").into_response();
    }
    match Question::from_query(uri.query().unwrap_or_default()) {
        Ok(question) => Json(client::ask(&question).await).into_response(),
        Err(refusal) => (StatusCode::BAD_REQUEST, refusal + "\n").into_response(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::connectivity::wire::{Answer, Cause, Protocol};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    const TOKEN: &str = "secret";

    /// A probe at two addresses of this machine's loopback, at ports of the kernel's choice.
    async fn probe(servers: &mut JoinSet<()>) -> Vec<SocketAddr> {
        let mut found = Vec::new();
        for address in ["127.0.0.1:0", "[::1]:0"] {
            found.push(echo::start("far", address.parse().expect("an address"), servers).await.expect("a port"));
        }
        found
    }

    fn question(protocol: Protocol, to: SocketAddr, bytes: usize) -> Question {
        Question { protocol, host: to.ip().to_string(), port: to.port(), bytes, family: None }
    }

    #[tokio::test]
    async fn payloads_come_back_with_the_source_that_the_server_saw() {
        let mut servers = JoinSet::new();
        for to in probe(&mut servers).await {
            for (protocol, bytes) in
                [(Protocol::Tcp, 64), (Protocol::Tcp, 1 << 20), (Protocol::Udp, 64), (Protocol::Udp, 8000)]
            {
                let answer = client::ask(&question(protocol, to, bytes)).await;
                let Answer::Reached { server, source, local, .. } = answer else { panic!("{protocol:?} {answer:?}") };
                assert_eq!((server.as_deref(), source, local), (Some("far"), Some(to.ip()), to.ip()));
            }
            let answer = client::ask(&question(Protocol::Connect, to, 64)).await;
            assert!(matches!(answer, Answer::Reached { server: None, source: None, .. }), "{answer:?}");
        }
    }

    #[tokio::test]
    async fn refusals_and_silence_differ() {
        let silent = tokio::net::UdpSocket::bind("127.0.0.1:0").await.expect("a port");
        let to = silent.local_addr().expect("its address");
        for (protocol, cause) in [(Protocol::Tcp, Cause::Refused), (Protocol::Udp, Cause::TimedOut)] {
            let answer = client::ask(&question(protocol, to, 64)).await;
            assert!(matches!(&answer, Answer::Failed { cause: it, .. } if *it == cause), "{answer:?}");
        }
        drop(silent);
        let answer = client::ask(&question(Protocol::Udp, to, 64)).await;
        assert!(matches!(&answer, Answer::Failed { cause: Cause::Refused, .. }), "{answer:?}");
    }

    #[tokio::test]
    async fn an_echo_of_other_bytes_is_corrupt() {
        let liar = tokio::net::UdpSocket::bind("127.0.0.1:0").await.expect("a port");
        let to = liar.local_addr().expect("its address");
        tokio::spawn(async move {
            let mut buffer = [0; 1024];
            let (length, from) = liar.recv_from(&mut buffer).await.expect("a datagram");
            buffer[length - 1] ^= 1;
            let seen = super::super::wire::Seen { server: "far".into(), source: from.ip() };
            liar.send_to(&[&seen.encode()[..], &buffer[..length]].concat(), from).await.expect("sent");
        });
        let answer = client::ask(&question(Protocol::Udp, to, 64)).await;
        assert!(matches!(&answer, Answer::Failed { cause: Cause::Corrupt, .. }), "{answer:?}");
    }

    async fn get(addr: SocketAddr, path: &str, token: &str) -> String {
        let mut stream = tokio::net::TcpStream::connect(addr).await.expect("connected");
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\n{TOKEN_HEADER}: {token}\r\n\r\n");
        stream.write_all(request.as_bytes()).await.expect("asked");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.expect("answered");
        answer
    }

    #[tokio::test]
    async fn only_who_knows_the_secret_may_ask() {
        let mut servers = JoinSet::new();
        let to = probe(&mut servers).await[0];
        let listener = http::bind("127.0.0.1:0".parse().expect("an address")).expect("a port");
        let addr = listener.local_addr().expect("its address");
        let asking = Arc::new(Asking { token: TOKEN.into() });
        servers.spawn(http::serve_on(listener, router(asking), LIMITS));
        let path = format!("{PATH}?{}", question(Protocol::Tcp, to, 64).to_query());
        let answer = get(addr, &path, TOKEN).await;
        assert!(answer.contains("200 OK") && answer.contains(r#""outcome":"reached""#), "{answer}");
        assert!(get(addr, &path, "guess").await.contains("403 Forbidden"));
        assert!(get(addr, PATH, TOKEN).await.contains("400 Bad Request"));
        assert!(get(addr, HEALTH_PATH, "").await.contains("200 OK"));
    }
}
