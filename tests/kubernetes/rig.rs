//! One node with its real agent and an API server that only this node can reach: what the agent says, and what it does.

use super::cluster::{Cluster, block_on, one_at_a_time};
use super::reports::events;
use super::server::Server;
use anyhow::{Context as _, Result, bail, ensure};
use std::path::Path;
use std::sync::MutexGuard;
use std::time::Duration;
use testkit::apiserver::Store;
use testkit::{Fabric, Node, Setup, wait};

/// Back-off between two attempts at a server grows to 22 s, the host's network is looked at every 30 s, and a silent server is
/// noticed after 150 s.
const DEADLINE: Duration = Duration::from_secs(200);

/// The order of the fields is the order of their end.
pub struct Rig {
    /// The API server, in the node's own namespace.
    pub server: Server,
    fabric: Fabric,
    _one: MutexGuard<'static, ()>,
}

impl Rig {
    /// Builds everything but the agent. `arguments` are added to the API server's own.
    pub fn start(arguments: &[&str]) -> Result<Self> {
        let one = one_at_a_time();
        let fabric = Fabric::build(Setup { nodes: 1, ..Setup::default() })?;
        let server = Server::start(fabric.node(1).netns(), Store::Pinned, arguments)?;
        Ok(Self { server, fabric, _one: one })
    }

    /// The node.
    pub fn node(&self) -> &Node {
        self.fabric.node(1)
    }

    /// Starts the agent with this kubeconfig; it need not become ready.
    pub fn start_agent(&self, kubeconfig: &Path) -> Result<()> {
        self.node().spawn_agent(&["--kubeconfig", &kubeconfig.display().to_string()])
    }

    /// Does something with the cluster, by its administrator's hand.
    pub fn cluster<T: Send>(&self, work: impl AsyncFnOnce(Cluster) -> Result<T> + Send) -> Result<T> {
        let server = &self.server;
        self.node().netns().run(|| block_on(async { work(Cluster::new(server)?).await }))?
    }

    /// Applies objects.
    pub fn apply(&self, yaml: &str) -> Result<()> {
        self.cluster(async |cluster| cluster.apply(yaml).await)
    }

    /// What the agent holds in the kernel: services and peers.
    pub fn maps(&self) -> Result<String> {
        let all = ["services", "peers"].map(|what| self.node().rustnetctl(&[what, "-o", "json"]));
        let all: String = all.into_iter().collect::<Result<_>>()?;
        Ok(without_names(&all))
    }

    /// Waits until the maps hold all of these words and none of those.
    pub fn holds(&self, what: &str, there: &[&str], gone: &[&str]) -> Result<()> {
        self.until(what, || {
            let maps = self.maps()?;
            let missing = there.iter().find(|word| !maps.contains(**word));
            let left = gone.iter().find(|word| maps.contains(**word));
            ensure!(missing.is_none() && left.is_none(), "missing {missing:?}, left {left:?}: {maps}");
            Ok(())
        })
    }

    /// Waits until the maps are as they were.
    pub fn until_maps(&self, before: &str) -> Result<()> {
        self.until("the maps are as before", || {
            let maps = self.maps()?;
            ensure!(maps == before, "{maps}");
            Ok(())
        })
    }

    /// Waits until `/readyz` answers with this status and all of these words.
    pub fn answers(&self, status: u16, words: &[&str]) -> Result<()> {
        self.until(&format!("/readyz answers {status} {words:?}"), || {
            let answer = self.node().http_get("127.0.0.1:9879".parse()?, "/readyz")?;
            ensure!(answer.starts_with(&format!("HTTP/1.1 {status} ")) && has_all(&answer, words), "{answer}");
            Ok(())
        })
    }

    /// Waits until a line of the agent's log has all of these words.
    pub fn logs(&self, words: &[&str]) -> Result<()> {
        self.until(&format!("the log has {words:?}"), || {
            let log = std::fs::read_to_string(self.node().agent_log_path())?;
            ensure!(log.lines().any(|line| has_all(line, words)), "no such line");
            Ok(())
        })
    }

    /// Waits until an event on this node's object, `Warning` or `Normal`, has all of these words.
    pub fn tells(&self, kind: &str, words: &[&str]) -> Result<()> {
        self.until(&format!("a {kind} event has {words:?}"), || {
            let server = &self.server;
            let all = self.cluster(async |_| events(server).await)?;
            let notes: Vec<_> = all.iter().map(|event| (event.type_.as_deref(), event.note.as_deref())).collect();
            let is =
                |it: &&(Option<&str>, Option<&str>)| it.0 == Some(kind) && has_all(it.1.unwrap_or_default(), words);
            ensure!(notes.iter().any(|it| is(&it)), "{notes:?}");
            Ok(())
        })
    }

    /// A fault from its beginning to its end, as people see it: a line of the log and a warning on
    /// the node's object with these words, then the same as news that it is over. `fault` and
    /// `repair` are done in between, by the same agent process.
    pub fn survives(
        &mut self,
        words: &[&str],
        fault: impl FnOnce(&mut Self) -> Result<()>,
        repair: impl FnOnce(&mut Self) -> Result<()>,
    ) -> Result<()> {
        self.endures(words, fault, repair)?;
        self.tells("Warning", words)?;
        self.tells("Normal", words)
    }

    /// The same of what is no news: an outage of the API server that is over within a minute.
    pub fn endures(
        &mut self,
        words: &[&str],
        fault: impl FnOnce(&mut Self) -> Result<()>,
        repair: impl FnOnce(&mut Self) -> Result<()>,
    ) -> Result<()> {
        let pid = self.node().agent_pid().context("an agent")?;
        fault(self)?;
        self.logs(&[words, &["WARN"]].concat())?;
        repair(self)?;
        ensure!(self.node().agent_runs() && self.node().agent_pid() == Some(pid), "the agent has ended");
        Ok(())
    }

    fn until<T>(&self, what: &str, mut look: impl FnMut() -> Result<T>) -> Result<T> {
        let looked = wait::until_deadline(what, DEADLINE, || {
            let looked = look();
            if looked.is_err() && !self.node().agent_runs() {
                bail!("the agent has ended");
            }
            looked
        });
        looked.with_context(|| format!("the agent's log ends:\n{}", self.node().agent_log(40)))
    }
}

fn has_all(text: &str, words: &[&str]) -> bool {
    words.iter().all(|word| text.contains(word))
}

/// Output of the command without names of Services: these are not in the maps, and the agent writes them a second later.
pub fn without_names(json: &str) -> String {
    let is_name = |line: &&str| ["\"service\":", "\"portName\":"].iter().any(|key| line.trim().starts_with(key));
    json.lines().filter(|line| !is_name(line)).fold(String::new(), |text, line| text + line + "\n")
}
