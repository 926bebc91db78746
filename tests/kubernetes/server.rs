//! The API server of one test: `testkit`'s, with an audit log, a client, and a store whose history can be forgotten.

use anyhow::{Context as _, Result, ensure};
use kube::{Client, Config};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::Command;
use tempfile::TempDir;
use testkit::Netns;
use testkit::apiserver::{self, ETCD_PORT, Options, PORT};
pub use testkit::apiserver::{ADMIN, Store, User, kubernetes};

const AUDIT_LOG: &str = "audit.log";

/// May do what the agent's RBAC objects say, once they are applied.
pub const AGENT: User = User {
    name: "system:serviceaccount:rustnet-system:rustnet-agent",
    groups: "system:serviceaccounts,system:authenticated",
    token: "token-of-the-agent",
};

/// An API server with its store; both go with it.
pub struct Server {
    server: apiserver::Server,
    dir: TempDir,
}

impl Server {
    /// Starts the store and prepares everything for the API server, but does not start that yet. `arguments` are added to its own.
    pub fn prepare(netns: &Netns, store: Store, arguments: &[&str]) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix(&format!("rn{}-kubernetes-", std::process::id())).tempdir()?;
        let policy = dir.path().join("audit.yaml");
        std::fs::write(&policy, "apiVersion: audit.k8s.io/v1\nkind: Policy\nrules: [{level: Metadata}]\n")?;
        let mut all = vec![
            format!("--audit-policy-file={}", policy.display()),
            format!("--audit-log-path={}", dir.path().join(AUDIT_LOG).display()),
            "--audit-log-mode=blocking-strict".to_owned(),
            // The tests compact when they want it.
            "--etcd-compaction-interval=0".to_owned(),
            // Its own address is loopback, which no endpoint can be.
            "--endpoint-reconciler-type=none".to_owned(),
            // Ends with open watches, rather than waiting for them.
            "--shutdown-send-retry-after=false".to_owned(),
            "--shutdown-watch-termination-grace-period=0s".to_owned(),
        ];
        all.extend(arguments.iter().map(ToString::to_string));
        let addresses = [Ipv4Addr::LOCALHOST.into()];
        let options = Options { addresses: &addresses, users: &[AGENT], store, arguments: all };
        Ok(Self { server: apiserver::Server::prepare(netns, dir.path(), options)?, dir })
    }

    /// Starts everything; returns once the API server is ready.
    pub fn start(netns: &Netns, store: Store, arguments: &[&str]) -> Result<Self> {
        let mut server = Self::prepare(netns, store, arguments)?;
        server.start_api()?;
        Ok(server)
    }

    /// Starts the API server and waits until it is ready.
    pub fn start_api(&mut self) -> Result<()> {
        self.server.start_api()
    }

    /// Ends the API server, connections and all.
    pub fn stop_api(&mut self) {
        self.server.stop_api();
    }

    /// Sends a signal to the API server.
    pub fn signal_api(&self, signal: Signal) -> Result<()> {
        self.server.signal_api(signal)
    }

    /// Puts an empty store in the place of the one there is; the API server is to be started again.
    pub fn renew_store(&mut self) -> Result<()> {
        self.server.renew_store()
    }

    /// The namespace it is in.
    pub fn netns(&self) -> &Netns {
        self.server.netns()
    }

    /// Runs kubectl as [`ADMIN`].
    pub fn kubectl(&self, args: &[&str]) -> Result<String> {
        self.server.kubectl(args)
    }

    /// Where its certificate is, which is its own authority.
    pub fn authority(&self) -> PathBuf {
        self.dir.path().join("server.crt")
    }

    /// The server's address; it can be had only inside the namespace.
    pub fn address() -> SocketAddr {
        (Ipv4Addr::LOCALHOST, PORT).into()
    }

    /// A client.
    pub fn client(&self, user: User) -> Result<Client> {
        let mut config = Config::new(format!("https://{}", Self::address()).parse()?);
        config.root_cert = Some(vec![self.certificate()?]);
        config.auth_info.token = Some(user.token.to_owned().into());
        Ok(Client::try_from(config)?)
    }

    /// A kubeconfig for this user that names the server `url`.
    pub fn kubeconfig(&self, user: User, url: &str) -> Result<PathBuf> {
        self.server.kubeconfig(user, url)
    }

    /// Forgets all of the store's history before now.
    pub fn compact(&self) -> Result<()> {
        // Base64 of a zero byte: the first key there is.
        let now = self.etcd_call("kv/range", &json!({"key": "AA==", "limit": 1}))?;
        let revision = &now["header"]["revision"];
        self.etcd_call("kv/compaction", &json!({"revision": revision, "physical": true}))?;
        Ok(())
    }

    /// What this user has asked of the server, as its audit log tells.
    pub fn audit(&self, user: User) -> Result<Vec<Request>> {
        let text = std::fs::read_to_string(self.dir.path().join(AUDIT_LOG))?;
        let mut requests = Vec::new();
        // The last line may be half written.
        for line in text.lines().filter(|line| line.ends_with('}')) {
            let entry: Value = serde_json::from_str(line)?;
            if entry["user"]["username"] == user.name && entry["stage"] == "RequestReceived" {
                let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
                requests.push(Request { verb: text(&entry["verb"]), uri: text(&entry["requestURI"]) });
            }
        }
        Ok(requests)
    }

    fn certificate(&self) -> Result<Vec<u8>> {
        let der = Command::new("openssl")
            .args(["x509", "-outform", "DER", "-in"])
            .arg(self.dir.path().join("server.crt"))
            .output()?;
        ensure!(der.status.success(), "openssl: {}", String::from_utf8_lossy(&der.stderr));
        Ok(der.stdout)
    }

    fn etcd_call(&self, what: &str, body: &Value) -> Result<Value> {
        let body = body.to_string();
        let request = format!(
            "POST /v3/{what} HTTP/1.0\r\nHost: etcd\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        let answer = self.server.netns().run(|| -> Result<String> {
            let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, ETCD_PORT))?;
            stream.write_all(request.as_bytes())?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            Ok(answer)
        })??;
        let (head, body) = answer.split_once("\r\n\r\n").context("etcd answered nonsense")?;
        ensure!(head.contains(" 200 "), "etcd refused {what}: {answer}");
        Ok(serde_json::from_str(body)?)
    }
}

/// One request.
#[derive(Clone, Debug)]
pub struct Request {
    /// `watch`, `list`, `get`, `patch`...
    pub verb: String,
    /// Path and query.
    pub uri: String,
}
