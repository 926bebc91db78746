//! etcd and kube-apiserver, started for one test and gone with it.
//!
//! | Environment | Default |
//! |---|---|
//! | `RUSTNET_KUBERNETES` | `kubernetes/<version of go.mod>/bin` in rustnet's cache directory: `kube-apiserver`, `kubectl`, `etcd` |

use anyhow::{Context as _, Result, bail, ensure};
use kube::{Client, Config};
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use testkit::Netns;
use testkit::janitor::{self, Process};

/// Port of the API server.
pub const PORT: u16 = 6443;
const ETCD_PORT: u16 = 2379;
const READY: Duration = Duration::from_mins(2);
const AUDIT_LOG: &str = "audit.log";

/// Whoever talks to the server: name and groups, and the token that proves it.
#[derive(Clone, Copy, Debug)]
pub struct User {
    name: &'static str,
    groups: &'static str,
    token: &'static str,
}

/// May do everything.
pub const ADMIN: User = User { name: "admin", groups: "system:masters", token: "token-of-the-admin" };
/// May do what the agent's RBAC objects say, once they are applied.
pub const AGENT: User = User {
    name: "system:serviceaccount:rustnet-system:rustnet-agent",
    groups: "system:serviceaccounts,system:authenticated",
    token: "token-of-the-agent",
};

/// Which etcd.
#[derive(Clone, Copy, Debug)]
pub enum Store {
    /// The one that was built with the API server.
    Pinned,
    /// The distribution's, which may be too old for streaming lists.
    Distribution,
}

/// An API server with its store.
pub struct Server {
    netns: Netns,
    dir: TempDir,
    arguments: Vec<String>,
    api: Option<Process>,
    _etcd: Process,
}

impl Server {
    /// Starts the store and prepares everything for the API server, but does not start that yet. `arguments` are added to its own.
    pub fn prepare(netns: &Netns, store: Store, arguments: &[&str]) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix(&format!("rn{}-kubernetes-", std::process::id())).tempdir()?;
        secrets(dir.path())?;
        let etcd = etcd(netns, store, dir.path())?;
        let arguments = arguments.iter().map(ToString::to_string).collect();
        Ok(Self { netns: netns.clone(), dir, arguments, api: None, _etcd: etcd })
    }

    /// Starts everything; returns once the API server is ready.
    pub fn start(netns: &Netns, store: Store, arguments: &[&str]) -> Result<Self> {
        let mut server = Self::prepare(netns, store, arguments)?;
        server.start_api()?;
        Ok(server)
    }

    /// Starts the API server and waits until it is ready.
    pub fn start_api(&mut self) -> Result<()> {
        let dir = self.dir.path();
        let path = |name: &str| dir.join(name).display().to_string();
        let log = File::options().create(true).append(true).open(dir.join("apiserver.log"))?;
        let mut command = self.netns.command(kubernetes("kube-apiserver")?)?;
        command = command.args([
            &format!("--etcd-servers=http://127.0.0.1:{ETCD_PORT}"),
            // The tests compact when they want it.
            "--etcd-compaction-interval=0",
            "--bind-address=127.0.0.1",
            "--advertise-address=127.0.0.1",
            &format!("--secure-port={PORT}"),
            &format!("--tls-cert-file={}", path("server.crt")),
            &format!("--tls-private-key-file={}", path("server.key")),
            &format!("--token-auth-file={}", path("tokens.csv")),
            "--authorization-mode=RBAC",
            "--allow-privileged=true",
            "--service-cluster-ip-range=10.96.0.0/16,fd00:96::/112",
            "--service-account-issuer=https://kubernetes.default.svc",
            &format!("--service-account-key-file={}", path("accounts.key")),
            &format!("--service-account-signing-key-file={}", path("accounts.key")),
            // Its own address is loopback, which no endpoint can be.
            "--endpoint-reconciler-type=none",
            &format!("--audit-policy-file={}", path("audit.yaml")),
            &format!("--audit-log-path={}", path(AUDIT_LOG)),
            "--audit-log-mode=blocking-strict",
            // Ends with open watches, rather than waiting for them.
            "--shutdown-send-retry-after=false",
            "--shutdown-watch-termination-grace-period=0s",
        ]);
        command = command.args(&self.arguments);
        command.inner().stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let mut api = command.spawn()?;
        let result = self.wait_until_ready(&mut api);
        self.api = Some(api);
        result
    }

    /// Ends the API server, connections and all.
    pub fn stop_api(&mut self) {
        self.api = None;
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
        let path = self.dir.path().join(format!("{}.kubeconfig", user.token));
        let text = format!(
            "apiVersion: v1\nkind: Config\n\
             clusters: [{{name: c, cluster: {{server: {url:?}, certificate-authority: {}}}}}]\n\
             users: [{{name: u, user: {{token: {:?}}}}}]\n\
             contexts: [{{name: x, context: {{cluster: c, user: u}}}}]\ncurrent-context: x\n",
            self.dir.path().join("server.crt").display(),
            user.token,
        );
        std::fs::write(&path, text)?;
        Ok(path)
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
        let answer = self.netns.run(|| -> Result<String> {
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

    fn wait_until_ready(&self, api: &mut Process) -> Result<()> {
        let client_in_netns = || -> Result<()> {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                let ready = self.client(ADMIN)?.request_text(http_get("/readyz")?).await?;
                ensure!(ready == "ok", "{ready}");
                Ok(())
            })
        };
        let start = Instant::now();
        loop {
            let Err(error) = self.netns.run(client_in_netns)? else { return Ok(()) };
            if let Some(status) = api.ended() {
                bail!("kube-apiserver ended: {status}\n{}", self.log_tail());
            }
            if start.elapsed() > READY {
                bail!("kube-apiserver is not ready after {} s: {error:#}\n{}", READY.as_secs(), self.log_tail());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn log_tail(&self) -> String {
        let log = std::fs::read_to_string(self.dir.path().join("apiserver.log")).unwrap_or_default();
        let lines: Vec<_> = log.lines().rev().take(20).collect();
        lines.into_iter().rev().fold(String::new(), |mut text, line| {
            let _ = writeln!(text, "  {line}");
            text
        })
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

/// Where a program of Kubernetes is.
pub fn kubernetes(program: &str) -> Result<PathBuf> {
    let dir = match std::env::var_os("RUSTNET_KUBERNETES") {
        Some(dir) => PathBuf::from(dir),
        None => cache()?.join("kubernetes").join(version()?).join("bin"),
    };
    let path = dir.join(program);
    ensure!(
        path.is_file(),
        "{} is missing: run `cargo xtask setup --with kubernetes`, which builds it",
        path.display()
    );
    Ok(path)
}

/// The version of Kubernetes that is built for the tests.
pub fn version() -> Result<&'static str> {
    let required = include_str!("go.mod").lines().find_map(|line| line.strip_prefix("require k8s.io/kubernetes "));
    required.map(str::trim).context("tests/kubernetes/go.mod does not require k8s.io/kubernetes")
}

fn cache() -> Result<PathBuf> {
    let base = match std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from) {
        Some(base) if base.is_absolute() => base,
        _ => PathBuf::from(std::env::var_os("HOME").context("HOME is not set")?).join(".cache"),
    };
    Ok(base.join("rustnet"))
}

fn etcd(netns: &Netns, store: Store, dir: &Path) -> Result<Process> {
    let program = match store {
        Store::Pinned => kubernetes("etcd")?,
        Store::Distribution => "etcd".into(),
    };
    let log = File::create(dir.join("etcd.log"))?;
    let mut command = netns.command(program)?.args([
        "--data-dir",
        &dir.join("etcd").display().to_string(),
        "--unsafe-no-fsync",
        &format!("--listen-client-urls=http://127.0.0.1:{ETCD_PORT}"),
        &format!("--advertise-client-urls=http://127.0.0.1:{ETCD_PORT}"),
        "--listen-peer-urls=http://127.0.0.1:2380",
    ]);
    if let Store::Pinned = store {
        // As clusters have it, but faster: by this the API server learns how far an idle resource is.
        command = command.args(["--watch-progress-notify-interval=500ms"]);
    }
    command.inner().stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    command.spawn().context("etcd (package etcd-server): run `cargo xtask setup`, which installs it")
}

/// Certificate, keys and tokens; none of them outlives the directory.
fn secrets(dir: &Path) -> Result<()> {
    let san = format!("subjectAltName=IP:{}", IpAddr::from(Ipv4Addr::LOCALHOST));
    let openssl = |arguments: &[&str]| -> Result<()> {
        let mut command = Command::new("openssl");
        command.args(arguments).current_dir(dir).stdin(Stdio::null());
        let output = janitor::output(command)?;
        ensure!(output.status.success(), "openssl: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    };
    // Without a configuration of ours, the system's would make an authority of it, which no server may be.
    std::fs::write(dir.join("openssl.cnf"), "[req]\ndistinguished_name = dn\n[dn]\n")?;
    let request = ["req", "-x509", "-config", "openssl.cnf", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"];
    let names = ["-nodes", "-days", "2", "-subj", "/CN=test", "-addext", "basicConstraints=critical,CA:FALSE"];
    openssl(&[&request[..], &names, &["-addext", &san, "-keyout", "server.key", "-out", "server.crt"]].concat())?;
    openssl(&["genrsa", "-out", "accounts.key", "2048"])?;
    let tokens = [ADMIN, AGENT].map(|User { name, groups, token }| format!("{token},{name},{name},\"{groups}\"\n"));
    std::fs::write(dir.join("tokens.csv"), tokens.concat())?;
    let policy = "apiVersion: audit.k8s.io/v1\nkind: Policy\nrules: [{level: Metadata}]\n";
    std::fs::write(dir.join("audit.yaml"), policy)?;
    Ok(())
}

fn http_get(path: &str) -> Result<axum::http::Request<Vec<u8>>> {
    Ok(axum::http::Request::get(path).body(Vec::new())?)
}
