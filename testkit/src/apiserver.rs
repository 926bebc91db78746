//! etcd and kube-apiserver in a namespace: [`Server`] in any, [`ApiServer`] on a host of its own on a fabric's switch.
//!
//! | Environment | Default |
//! |---|---|
//! | `RUSTNET_KUBERNETES` | `kubernetes/<version>/bin` in rustnet's cache directory: `kube-apiserver`, `kubectl`, `etcd` |

use crate::fabric::Fabric;
use crate::janitor::{self, Process};
use crate::netns::{Holder, Netns};
use crate::wait;
use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use std::fs::File;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// Port of the API server.
pub const PORT: u16 = 6443;
/// Port of etcd, on the namespace's loopback interface.
pub const ETCD_PORT: u16 = 2379;
/// A cold API server on a small machine takes its time.
const READY: Duration = Duration::from_mins(2);
/// The last octet of the control plane's address on the switch.
const LAST: u8 = 2;

/// Whoever talks to the server.
#[derive(Clone, Copy, Debug)]
pub struct User {
    /// Name.
    pub name: &'static str,
    /// Groups, separated by commas.
    pub groups: &'static str,
    /// The token that proves it.
    pub token: &'static str,
}

/// May do everything; every server knows this user.
pub const ADMIN: User = User { name: "admin", groups: "system:masters", token: "token-of-the-admin" };

/// Which etcd.
#[derive(Clone, Copy, Debug)]
pub enum Store {
    /// The one that was built with the API server.
    Pinned,
    /// The distribution's, which may be too old for streaming lists.
    Distribution,
}

/// How a server is to be.
#[derive(Clone, Debug)]
pub struct Options<'a> {
    /// Where it can be had, as its certificate says; the first is advertised.
    pub addresses: &'a [IpAddr],
    /// Users in addition to [`ADMIN`].
    pub users: &'a [User],
    /// Its store.
    pub store: Store,
    /// Arguments in addition to its own.
    pub arguments: Vec<String>,
}

/// An API server with its store.
#[derive(Debug)]
pub struct Server {
    netns: Netns,
    dir: PathBuf,
    url: String,
    arguments: Vec<String>,
    api: Option<Process>,
    store: Store,
    etcd: Option<Process>,
}

impl Server {
    /// Starts the store and prepares everything for the API server in `dir`, but does not start that yet.
    pub fn prepare(netns: &Netns, dir: &Path, options: Options<'_>) -> Result<Self> {
        let advertised = options.addresses.first().context("an API server needs an address")?;
        secrets(dir, options.addresses, options.users)?;
        let path = |name: &str| dir.join(name).display().to_string();
        let mut arguments = vec![
            format!("--etcd-servers=http://127.0.0.1:{ETCD_PORT}"),
            "--bind-address=0.0.0.0".into(),
            format!("--advertise-address={advertised}"),
            format!("--secure-port={PORT}"),
            format!("--tls-cert-file={}", path("server.crt")),
            format!("--tls-private-key-file={}", path("server.key")),
            format!("--token-auth-file={}", path("tokens.csv")),
            "--authorization-mode=RBAC".into(),
            "--allow-privileged=true".into(),
            "--service-cluster-ip-range=10.96.0.0/16,fd00:96::/108".into(),
            "--service-account-issuer=https://kubernetes.default.svc".into(),
            format!("--service-account-key-file={}", path("accounts.key")),
            format!("--service-account-signing-key-file={}", path("accounts.key")),
        ];
        arguments.extend(options.arguments);
        let url = format!("https://{}", SocketAddr::new(*advertised, PORT));
        let etcd = Some(etcd(netns, options.store, dir)?);
        Ok(Self { netns: netns.clone(), dir: dir.to_owned(), url, arguments, api: None, store: options.store, etcd })
    }

    /// Puts an empty store in the place of the one there is, and ends the API server, which is not made for that.
    pub fn renew_store(&mut self) -> Result<()> {
        (self.api, self.etcd) = (None, None);
        std::fs::remove_dir_all(self.dir.join("etcd")).context("cannot remove the store's data")?;
        self.etcd = Some(etcd(&self.netns, self.store, &self.dir)?);
        Ok(())
    }

    /// Starts the API server and waits until it is ready.
    pub fn start_api(&mut self) -> Result<()> {
        let log = File::options().create(true).append(true).open(self.log())?;
        let command = self.netns.command(kubernetes("kube-apiserver")?)?.args(&self.arguments);
        let mut api = command.stdout(log.try_clone()?).stderr(log).spawn()?;
        let ready = self.wait_until_ready(&mut api);
        self.api = Some(api);
        ready.with_context(|| self.log_tail())
    }

    /// Ends the API server, connections and all.
    pub fn stop_api(&mut self) {
        self.api = None;
    }

    /// Sends a signal to the API server.
    pub fn signal_api(&self, signal: Signal) -> Result<()> {
        self.api.as_ref().context("no API server runs")?.signal(signal)
    }

    /// The namespace it is in.
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// A kubeconfig for this user that names the server `url`.
    pub fn kubeconfig(&self, user: User, url: &str) -> Result<PathBuf> {
        self.write_kubeconfig(user.name, user, url)
    }

    fn write_kubeconfig(&self, name: &str, user: User, url: &str) -> Result<PathBuf> {
        let path = self.dir.join(format!("{name}.kubeconfig"));
        let text = format!(
            "apiVersion: v1\nkind: Config\n\
             clusters: [{{name: c, cluster: {{server: {url:?}, certificate-authority: {}}}}}]\n\
             users: [{{name: u, user: {{token: {:?}}}}}]\n\
             contexts: [{{name: x, context: {{cluster: c, user: u}}}}]\ncurrent-context: x\n",
            self.dir.join("server.crt").display(),
            user.token,
        );
        std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(path)
    }

    /// Runs kubectl as [`ADMIN`].
    pub fn kubectl(&self, args: &[&str]) -> Result<String> {
        let config = self.write_kubeconfig("kubectl", ADMIN, &self.url)?;
        self.netns.command(kubernetes("kubectl")?)?.env("KUBECONFIG", config).args(args).text()
    }

    fn wait_until_ready(&self, api: &mut Process) -> Result<()> {
        wait::until_deadline("kube-apiserver ready", READY, || {
            if let Some(status) = api.ended() {
                bail!("it ended: {status}");
            }
            // Cheaper than a kubectl that fails.
            self.netns.run(|| TcpStream::connect((Ipv4Addr::LOCALHOST, PORT)).map(drop))??;
            self.kubectl(&["get", "--raw=/readyz"]).map(drop)
        })
    }

    fn log(&self) -> PathBuf {
        self.dir.join("apiserver.log")
    }

    fn log_tail(&self) -> String {
        let log = std::fs::read_to_string(self.log()).unwrap_or_default();
        let lines: Vec<_> = log.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n  ")
    }
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
        "{} is missing: run `cargo xtask setup --with kubernetes --with kube-proxy`, which builds it",
        path.display()
    );
    Ok(path)
}

/// The version of Kubernetes that is built for the tests.
fn version() -> Result<&'static str> {
    let module = include_str!("../../tests/kubernetes/go.mod");
    let required = module.lines().find_map(|line| line.strip_prefix("require k8s.io/kubernetes "));
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
    let url = format!("http://127.0.0.1:{ETCD_PORT}");
    let mut command = netns
        .command(program)?
        .args(["--unsafe-no-fsync", "--log-level=warn", "--listen-peer-urls=http://127.0.0.1:2380"])
        .args(["--listen-client-urls", &url, "--advertise-client-urls", &url])
        .args(["--data-dir", &dir.join("etcd").display().to_string()]);
    if let Store::Pinned = store {
        // As clusters have it, but faster: by this the API server learns how far an idle resource is.
        command = command.args(["--watch-progress-notify-interval=500ms"]);
    }
    let started = command.stdout(log.try_clone()?).stderr(log).spawn();
    started.context("etcd (package etcd-server): run `cargo xtask setup`, which installs it")
}

/// Certificate, keys and tokens; none of them outlives the directory.
fn secrets(dir: &Path, addresses: &[IpAddr], users: &[User]) -> Result<()> {
    let openssl = |arguments: &[&str]| -> Result<()> {
        let mut command = Command::new("openssl");
        command.args(arguments).current_dir(dir);
        let output = janitor::output(command)?;
        ensure!(output.status.success(), "openssl: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    };
    // Without a configuration of ours, the system's would make an authority of it, which no server may be.
    std::fs::write(dir.join("openssl.cnf"), "[req]\ndistinguished_name = dn\n[dn]\n")?;
    let san: Vec<String> = addresses.iter().map(|address| format!("IP:{address}")).collect();
    let san = format!("subjectAltName={}", san.join(","));
    let request = ["req", "-x509", "-config", "openssl.cnf", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"];
    let names = ["-nodes", "-days", "2", "-subj", "/CN=test", "-addext", "basicConstraints=critical,CA:FALSE"];
    openssl(&[&request[..], &names, &["-addext", &san, "-keyout", "server.key", "-out", "server.crt"]].concat())?;
    openssl(&["genrsa", "-out", "accounts.key", "2048"])?;
    let all = std::iter::once(&ADMIN).chain(users);
    let tokens: Vec<_> =
        all.map(|User { name, groups, token }| format!("{token},{name},{name},\"{groups}\"\n")).collect();
    std::fs::write(dir.join("tokens.csv"), tokens.concat())?;
    Ok(())
}

/// A control plane for a fabric, fed by kubectl.
#[derive(Debug)]
pub struct ApiServer {
    server: Server,
    kubeconfig: PathBuf,
    _host: Holder,
}

impl ApiServer {
    /// Starts it on the switch of a fabric, and waits until it is ready.
    pub fn start(fabric: &Fabric) -> Result<Self> {
        let host = fabric.add_host("cp", LAST)?;
        let dir = fabric.dir().join("cp");
        std::fs::create_dir(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        let address = Ipv4Addr::new(172, 18, 0, LAST);
        let v6 = Ipv6Addr::new(0xfd00, 0x18, 0, 0, 0, 0, 0, LAST.into());
        let addresses = [address.into(), v6.into(), Ipv4Addr::LOCALHOST.into()];
        let options = Options { addresses: &addresses, users: &[], store: Store::Pinned, arguments: Vec::new() };
        let mut server = Server::prepare(&host, &dir, options)?;
        server.start_api()?;
        let kubeconfig = server.kubeconfig(ADMIN, &server.url)?;
        Ok(Self { server, kubeconfig, _host: host })
    }

    /// A kubeconfig that may do everything.
    pub fn kubeconfig(&self) -> PathBuf {
        self.kubeconfig.clone()
    }

    /// Runs kubectl.
    pub fn kubectl(&self, args: &[&str]) -> Result<String> {
        self.server.kubectl(args)
    }

    /// Applies objects as YAML. Nodes are created with their status, as kubelets do.
    pub fn apply(&self, yaml: &str, verb: &str) -> Result<()> {
        let file = self.server.dir.join("apply.yaml");
        std::fs::write(&file, yaml)?;
        self.kubectl(&[verb, "-f", &file.display().to_string()]).map(drop)
    }
}
