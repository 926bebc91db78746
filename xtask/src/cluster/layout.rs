//! Names and places of one cluster: namespaces, directories, programs. Nothing here does anything.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::settings::{Both, Settings, address};
use crate::cmd::Cmd;
use crate::paths;

/// A cluster, running or not.
#[derive(Clone, Debug)]
pub struct Cluster {
    /// Prefix of everything that has a name on this machine.
    pub name: String,
    /// What was asked for.
    pub settings: Settings,
    /// Everything it writes.
    pub dir: PathBuf,
}

/// One node of a cluster.
#[derive(Clone, Debug)]
pub struct Node {
    /// `n1`, `n2`...: the Node object's name.
    pub name: String,
    /// Its place in the order of the nodes, from 1 on.
    pub number: u8,
}

impl Node {
    /// Its addresses.
    pub fn address(&self) -> Both<String> {
        address(10 + self.number)
    }
}

impl Cluster {
    /// A cluster of this name that is to be.
    pub fn new(name: &str, settings: Settings) -> Self {
        Self { name: name.to_owned(), settings, dir: dir(name) }
    }

    /// The cluster of this name that was started; none when there is none.
    pub fn find(name: &str) -> Result<Option<Self>> {
        let file = dir(name).join("settings.json");
        match fs::read_to_string(&file) {
            Ok(text) => {
                let settings = serde_json::from_str(&text).with_context(|| format!("reading {}", file.display()))?;
                Ok(Some(Self::new(name, settings)))
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| format!("reading {}", file.display())),
        }
    }

    /// Writes down what it is, for later commands.
    pub fn keep(&self) -> Result<()> {
        fs::create_dir_all(&self.dir)?;
        let file = self.dir.join("settings.json");
        fs::write(&file, serde_json::to_string(&self.settings)?).with_context(|| format!("writing {}", file.display()))
    }

    /// Its nodes.
    pub fn nodes(&self) -> Vec<Node> {
        (1..=self.settings.nodes).map(|number| Node { name: format!("n{number}"), number }).collect()
    }

    /// Name of a network namespace: `sw` the switch, `cp` the control plane, or a node's.
    pub fn netns(&self, of: &str) -> String {
        format!("{}-{of}", self.name)
    }

    /// A file that is this network namespace.
    pub fn netns_file(&self, of: &str) -> PathBuf {
        Path::new("/run/netns").join(self.netns(of))
    }

    /// A command inside a network namespace, and otherwise as here.
    pub fn inside(&self, of: &str, program: impl AsRef<std::ffi::OsStr>) -> Cmd {
        Cmd::new("nsenter").arg(format!("--net={}", self.netns_file(of).display())).arg(program)
    }

    /// Name of a node's control group in every hierarchy.
    pub fn cgroup(&self, node: &Node) -> String {
        self.netns(&node.name)
    }

    /// Directory of a node.
    pub fn node_dir(&self, node: &Node) -> PathBuf {
        self.dir.join(&node.name)
    }

    /// What stays of a node when it reboots.
    pub fn disk(&self, node: &Node) -> PathBuf {
        self.node_dir(node).join("data")
    }

    /// Keys and certificates.
    pub fn pki(&self, file: &str) -> String {
        self.dir.join("pki").join(file).display().to_string()
    }

    /// The kubeconfig of a component: `admin` is for this machine's users, `inside` the same from the cluster's segment.
    pub fn kubeconfig(&self, of: &str) -> String {
        self.dir.join(format!("{of}.kubeconfig")).display().to_string()
    }

    /// A program of Kubernetes that setup built.
    pub fn program(&self, name: &str) -> Result<String> {
        Ok(self.settings.version.programs()?.join(name).display().to_string())
    }

    /// kubectl as the administrator.
    pub fn kubectl(&self) -> Result<Cmd> {
        Ok(Cmd::new(self.program("kubectl")?).arg("--kubeconfig").arg(self.kubeconfig("admin")))
    }

    /// What kubectl prints.
    pub fn ask(&self, args: &[&str]) -> Result<String> {
        self.kubectl()?.args(args).capture()
    }
}

fn dir(name: &str) -> PathBuf {
    paths::cache().join("cluster").join(name)
}
