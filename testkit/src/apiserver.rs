//! A control plane for the fabric: etcd and kube-apiserver on a host of their own on the switch, fed by kubectl.
//!
//! The programs are found through `RUSTNET_KUBERNETES` (which `cargo xtask` sets) and `PATH`.

use crate::fabric::Fabric;
use crate::janitor::{self, Process};
use crate::netns::Holder;
use crate::wait;
use anyhow::{Context, Result, bail};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// The last octet of the control plane's address on the switch.
const LAST: u8 = 2;
/// Port of the API server.
const PORT: u16 = 6443;
/// A cold API server on a small machine takes its time.
const READY: Duration = Duration::from_mins(2);
/// Token of the only user.
const TOKEN: &str = "token-of-the-admin";

/// A running control plane.
#[derive(Debug)]
pub struct ApiServer {
    api: Process,
    _etcd: Process,
    host: Holder,
    dir: PathBuf,
    kubectl: PathBuf,
}

fn program(name: &str) -> Result<PathBuf> {
    let Some(dir) = std::env::var_os("RUSTNET_KUBERNETES") else {
        bail!("RUSTNET_KUBERNETES does not say where {name} is: start this by `cargo xtask`, which builds it")
    };
    let path = Path::new(&dir).join(name);
    if path.is_file() { Ok(path) } else { bail!("{} is missing: run `cargo xtask setup`", path.display()) }
}

fn openssl(dir: &Path, args: &[&str]) -> Result<()> {
    let mut command = Command::new("openssl");
    command.args(args).current_dir(dir);
    let output = janitor::output(command)?;
    if !output.status.success() {
        bail!("openssl: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}

impl ApiServer {
    /// Starts it on the switch of a fabric, and waits until it is ready.
    pub fn start(fabric: &Fabric) -> Result<Self> {
        let (api_program, kubectl) = (program("kube-apiserver")?, program("kubectl")?);
        let host = fabric.add_host("cp", LAST)?;
        let address = format!("172.18.0.{LAST}");
        let dir = fabric.dir().join("cp");
        std::fs::create_dir(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        let new_key = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"];
        let names = format!("subjectAltName=IP:{address},IP:fd00:18::{LAST},IP:127.0.0.1");
        // Clients refuse a certificate authority as a server.
        let leaf = "basicConstraints=critical,CA:FALSE";
        let to = [
            "-subj",
            "/CN=kube-apiserver",
            "-addext",
            leaf,
            "-addext",
            &names,
            "-keyout",
            "server.key",
            "-out",
            "server.crt",
        ];
        openssl(&dir, &[&new_key[..], &to[..]].concat())?;
        openssl(&dir, &["genrsa", "-out", "accounts.key", "2048"])?;
        std::fs::write(dir.join("tokens.csv"), format!("{TOKEN},admin,admin,\"system:masters\"\n"))?;
        let path = |name: &str| dir.join(name).display().to_string();
        std::fs::write(
            dir.join("kubeconfig"),
            format!(
                "apiVersion: v1\nkind: Config\n\
                 clusters: [{{name: c, cluster: {{server: \"https://{address}:{PORT}\", certificate-authority: {}}}}}]\n\
                 users: [{{name: u, user: {{token: {TOKEN}}}}}]\n\
                 contexts: [{{name: x, context: {{cluster: c, user: u}}}}]\ncurrent-context: x\n",
                path("server.crt")
            ),
        )?;
        let log = File::create(dir.join("etcd.log"))?;
        let etcd = host
            .command(std::env::var_os("RUSTNET_ETCD").unwrap_or_else(|| "etcd".into()))?
            .args(["--unsafe-no-fsync", "--log-level=warn", "--listen-peer-urls=http://127.0.0.1:2380"])
            .args(["--listen-client-urls=http://127.0.0.1:2379", "--advertise-client-urls=http://127.0.0.1:2379"])
            .args(["--data-dir", &path("etcd")])
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("etcd (package etcd-server): run `cargo xtask setup`, which installs it")?;
        let log = File::create(dir.join("apiserver.log"))?;
        let api = host
            .command(api_program)?
            .args(["--etcd-servers=http://127.0.0.1:2379", "--bind-address=0.0.0.0", "--authorization-mode=RBAC"])
            .args([format!("--advertise-address={address}"), format!("--secure-port={PORT}")])
            .args([
                format!("--tls-cert-file={}", path("server.crt")),
                format!("--token-auth-file={}", path("tokens.csv")),
            ])
            .args([format!("--tls-private-key-file={}", path("server.key"))])
            .args(["--service-cluster-ip-range=10.96.0.0/16,fd00:96::/108"])
            .args(["--service-account-issuer=https://kubernetes.default.svc"])
            .args([format!("--service-account-key-file={}", path("accounts.key"))])
            .args([format!("--service-account-signing-key-file={}", path("accounts.key"))])
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()?;
        let mut server = Self { api, _etcd: etcd, host, dir, kubectl };
        let ready = wait::until_deadline("kube-apiserver ready", READY, || {
            if let Some(status) = server.api.ended() {
                bail!("it ended: {status}");
            }
            server.kubectl(&["get", "--raw=/readyz"]).map(drop)
        });
        ready.with_context(|| format!("see {}", server.dir.join("apiserver.log").display()))?;
        Ok(server)
    }

    /// A kubeconfig that may do everything.
    pub fn kubeconfig(&self) -> PathBuf {
        self.dir.join("kubeconfig")
    }

    /// Runs kubectl.
    pub fn kubectl(&self, args: &[&str]) -> Result<String> {
        self.host.command(&self.kubectl)?.env("KUBECONFIG", self.kubeconfig()).args(args).text()
    }

    /// Applies objects as YAML. Nodes are created with their status, as kubelets do.
    pub fn apply(&self, yaml: &str, verb: &str) -> Result<()> {
        let file = self.dir.join("apply.yaml");
        std::fs::write(&file, yaml)?;
        self.kubectl(&[verb, "-f", &file.display().to_string()]).map(drop)
    }
}
