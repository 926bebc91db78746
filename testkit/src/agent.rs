//! The agent of a node: started, stopped, killed, and its log.

use crate::dist;
use crate::node::{Agent, Node};
use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use std::fs::OpenOptions;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Duration;

/// Where the agent answers `/readyz`, by default.
const HEALTH: &str = "127.0.0.1:9879";

impl Node {
    /// The agent's arguments, as [`Node::start_agent`] gives them.
    pub fn agent_args(&self, extra: &[&str]) -> Vec<String> {
        let plan = self.plan();
        let path = |p: PathBuf| p.display().to_string();
        let cgroup = self.cgroup().map_or_else(|| "/sys/fs/cgroup".into(), |c| c.display().to_string());
        let mut args = Vec::new();
        for (flag, value) in [
            ("--node-name", plan.name.clone()),
            ("--bpffs", path(self.bpffs())),
            ("--run-dir", path(self.run_dir())),
            ("--cgroup", cgroup),
            ("--routing", plan.routing.word().into()),
            ("--cni-bin-dir", path(self.cni_bin_dir())),
            ("--cni-conf-dir", path(self.cni_conf_dir())),
        ] {
            args.extend([flag.to_owned(), value]);
        }
        // Another source takes the place of the manifests.
        if !extra.iter().any(|arg| ["--kubeconfig", "--api-server", "--manifests"].contains(arg)) {
            args.extend(["--manifests".to_owned(), path(plan.manifests.clone())]);
        }
        if self.cgroup().is_none() {
            args.extend(["--socket-lb", "off"].map(ToOwned::to_owned));
        }
        args.extend(plan.agent.iter().chain(extra).map(ToString::to_string));
        args
    }

    /// Starts the agent and waits until it is ready.
    pub fn start_agent(&self, extra: &[&str]) -> Result<()> {
        self.spawn_agent(extra)?;
        self.wait_ready()
    }

    /// Starts the agent without waiting for it.
    pub fn spawn_agent(&self, extra: &[&str]) -> Result<()> {
        self.spawn_agent_of(&dist::find("rustnet-agent")?, &[], extra)
    }

    /// The same with a program of one's own (an agent of another build) and variables of its environment.
    pub fn spawn_agent_of(&self, program: &Path, env: &[(&str, &str)], extra: &[&str]) -> Result<()> {
        let mut agent = self.agent();
        if agent.is_some() {
            bail!("{} already has an agent", self.name());
        }
        let log = OpenOptions::new().create(true).append(true).open(self.agent_log_path())?;
        let mut command = self.netns().command(program)?.args(self.agent_args(extra));
        command.inner().stdin(std::process::Stdio::null()).envs(env.iter().copied());
        let command = command.stdout(log.try_clone()?).stderr(log);
        *agent = Some(Agent { process: command.spawn()? });
        Ok(())
    }

    /// Waits until the agent answers that it is ready.
    pub fn wait_ready(&self) -> Result<()> {
        // An upgrade loads all programs twice: on a busy machine that alone takes most of the usual time.
        let patience = 4 * crate::wait::deadline();
        crate::wait::until_deadline(&format!("agent of {} ready", self.name()), patience, || {
            if let Some(status) = self.agent().as_mut().and_then(|a| a.process.ended()) {
                bail!("the agent ended: {status}");
            }
            let answer = self.http_get(HEALTH.parse()?, "/readyz")?;
            if answer.starts_with("HTTP/1.1 200") { Ok(()) } else { bail!("/readyz says: {answer}") }
        })
        .with_context(|| format!("the agent's log ends:\n{}", self.agent_log(30)))
    }

    /// A small HTTP request from inside the node; the whole answer as text.
    pub fn http_get(&self, address: SocketAddr, path: &str) -> Result<String> {
        self.netns().run(|| -> Result<String> {
            let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(1))?;
            stream.set_read_timeout(Some(Duration::from_secs(2)))?;
            write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n")?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            Ok(answer)
        })?
    }

    /// Kills the agent without any chance to clean up.
    pub fn kill_agent(&self) -> Result<()> {
        self.end_agent(Signal::SIGKILL)
    }

    /// Asks the agent to end, and waits until it has.
    pub fn stop_agent(&self) -> Result<()> {
        self.end_agent(Signal::SIGTERM)
    }

    fn end_agent(&self, signal: Signal) -> Result<()> {
        let Some(mut agent) = self.agent().take() else { bail!("{} has no agent", self.name()) };
        agent.process.signal(signal)?;
        agent.process.wait();
        Ok(())
    }

    /// Waits until the agent has ended by itself, and lets go of it.
    pub fn wait_agent_ended(&self) -> Result<ExitStatus> {
        let status = crate::wait::until(&format!("the agent of {} ends", self.name()), || {
            self.agent().as_mut().and_then(|a| a.process.ended()).context("it runs")
        })?;
        self.agent().take();
        Ok(status)
    }

    /// True while an agent runs.
    pub fn agent_runs(&self) -> bool {
        self.agent().as_mut().is_some_and(|a| a.process.ended().is_none())
    }

    /// The agent's process id.
    pub fn agent_pid(&self) -> Option<u32> {
        self.agent().as_ref().map(|a| a.process.pid())
    }

    /// The agent's log file.
    pub fn agent_log_path(&self) -> PathBuf {
        self.dir().join("agent.log")
    }

    /// The last lines of the agent's log.
    pub fn agent_log(&self, lines: usize) -> String {
        let text = std::fs::read_to_string(self.agent_log_path()).unwrap_or_default();
        let all: Vec<&str> = text.lines().collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }
}
