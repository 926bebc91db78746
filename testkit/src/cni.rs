//! The CNI protocol from the runtime's side, as cnitool and containerd speak it: the first configuration list of the
//! directory, each plugin as a process with `CNI_*` variables and the configuration on standard input.

use crate::netns::NsCommand;
use crate::node::Node;
use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use std::fmt;
use std::fs::File;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

/// Where distributions put the reference plugins.
const PLUGIN_DIRS: [&str; 2] = ["/usr/lib/cni", "/opt/cni/bin"];

/// A call for one interface of one container.
#[derive(Clone, Debug)]
pub struct Attachment {
    /// The runtime's container id.
    pub container_id: String,
    /// Path of the pod's network namespace, valid inside the node; empty when it is gone.
    pub netns: String,
    /// Interface to make.
    pub ifname: String,
    /// `CNI_ARGS`.
    pub args: String,
}

/// An error of a plugin, in the shape of the specification.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CniError {
    /// Its code.
    pub code: u64,
    /// Its message and details.
    pub message: String,
}

impl fmt::Display for CniError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CNI error {}: {}", self.code, self.message)
    }
}

impl std::error::Error for CniError {}

impl Node {
    /// The configuration list that a runtime would take: the first by name.
    pub fn conflist(&self) -> Result<Value> {
        let dir = self.cni_conf_dir();
        let mut files: Vec<PathBuf> = std::fs::read_dir(&dir)
            .with_context(|| format!("cannot read {}", dir.display()))?
            .flatten()
            .map(|entry| entry.path())
            .filter(|p| p.extension().is_some_and(|e| e == "conf" || e == "conflist" || e == "json"))
            .collect();
        files.sort();
        let Some(first) = files.first() else {
            bail!("no CNI configuration in {}: is the agent ready?", dir.display())
        };
        let text = std::fs::read(first).with_context(|| format!("cannot read {}", first.display()))?;
        serde_json::from_slice(&text).with_context(|| format!("{} is not JSON", first.display()))
    }

    /// The same list with `more` (an object) put over the configuration of its first plugin.
    pub fn conflist_with(&self, more: &Value) -> Result<Value> {
        let mut list = self.conflist()?;
        for (key, value) in more.as_object().into_iter().flatten() {
            list["plugins"][0][key] = value.clone();
        }
        Ok(list)
    }

    /// Adds an interface by all plugins of the list; the last result.
    pub fn cni_add(&self, list: &Value, attachment: &Attachment) -> Result<Value> {
        let mut result = None;
        for plugin in plugins(list)? {
            result = Some(self.cni_call("ADD", attachment, &configuration(list, plugin, result.as_ref()))?);
        }
        result.context("the CNI configuration has no plugins")
    }

    /// Checks an interface against the result of its addition.
    pub fn cni_check(&self, list: &Value, attachment: &Attachment, result: &Value) -> Result<()> {
        for plugin in plugins(list)? {
            self.cni_call("CHECK", attachment, &configuration(list, plugin, Some(result)))?;
        }
        Ok(())
    }

    /// Deletes an interface; plugins in reverse order.
    pub fn cni_del(&self, list: &Value, attachment: &Attachment, result: Option<&Value>) -> Result<()> {
        for plugin in plugins(list)?.iter().rev() {
            self.cni_call("DEL", attachment, &configuration(list, plugin, result))?;
        }
        Ok(())
    }

    /// Has the first plugin remove whatever belongs to none of the attachments.
    pub fn cni_gc<'a>(&self, list: &Value, valid: impl IntoIterator<Item = &'a Attachment>) -> Result<()> {
        let valid: Vec<Value> =
            valid.into_iter().map(|a| json!({"containerID": a.container_id, "ifname": a.ifname})).collect();
        let mut configuration = self.cni_configuration(list)?;
        configuration["cniVersion"] = json!("1.1.0");
        configuration["cni.dev/valid-attachments"] = json!(valid);
        let nothing = Attachment {
            container_id: String::new(),
            netns: String::new(),
            ifname: String::new(),
            args: String::new(),
        };
        self.cni_call("GC", &nothing, &configuration).map(drop)
    }

    /// What the first plugin of a list gets.
    pub fn cni_configuration(&self, list: &Value) -> Result<Value> {
        let first = plugins(list)?.first().context("the CNI configuration has no plugins")?;
        Ok(configuration(list, first, None))
    }

    /// Calls one plugin with a configuration of one's own making.
    pub fn cni_call(&self, verb: &str, attachment: &Attachment, configuration: &Value) -> Result<Value> {
        let name = configuration["type"].as_str().context("the configuration has no type")?;
        let program = self.cni_bin_dir().join(name);
        self.cni_exec(&program, verb, attachment, configuration.to_string().as_bytes())
    }

    /// Calls a plugin and kills it (SIGKILL) after a while. True if it was still running then.
    pub fn cni_call_killed(
        &self,
        verb: &str,
        attachment: &Attachment,
        configuration: &Value,
        after: Duration,
    ) -> Result<bool> {
        let name = configuration["type"].as_str().context("the configuration has no type")?;
        let stdin = self.dir().join(format!("stdin-{}", attachment.container_id));
        std::fs::write(&stdin, configuration.to_string())?;
        let mut command = self.cni_command(&self.cni_bin_dir().join(name), verb, attachment)?;
        command.inner().stdin(File::open(&stdin)?);
        let mut process = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        std::thread::sleep(after);
        process.signal(Signal::SIGKILL)?;
        let killed = process.wait().signal().is_some();
        std::fs::remove_file(&stdin)?;
        Ok(killed)
    }

    /// A plugin's process with its environment, as a runtime makes it.
    fn cni_command(&self, program: &Path, verb: &str, attachment: &Attachment) -> Result<NsCommand> {
        let mut path = self.cni_bin_dir().into_os_string();
        for dir in PLUGIN_DIRS {
            path.push(":");
            path.push(dir);
        }
        let mut command = self.netns().command(program)?;
        command.inner().env_clear();
        Ok(command
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", &attachment.container_id)
            .env("CNI_NETNS", &attachment.netns)
            .env("CNI_IFNAME", &attachment.ifname)
            .env("CNI_ARGS", &attachment.args)
            .env("CNI_PATH", path)
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"))
    }

    /// Runs a plugin with any bytes on its standard input. Its error is a [`CniError`] where it follows the specification.
    pub fn cni_exec(&self, program: &Path, verb: &str, attachment: &Attachment, stdin: &[u8]) -> Result<Value> {
        let output = self.cni_command(program, verb, attachment)?.output(Some(stdin))?;
        let answer: Option<Value> = serde_json::from_slice(&output.stdout).ok();
        if output.status.success() {
            return Ok(answer.unwrap_or(Value::Null));
        }
        if let Some(code) = answer.as_ref().and_then(|a| a["code"].as_u64()) {
            let text = |key: &str| answer.as_ref().and_then(|a| a[key].as_str()).unwrap_or_default().to_owned();
            return Err(CniError { code, message: format!("{} {}", text("msg"), text("details")) })
                .with_context(|| format!("{verb} of {}", attachment.container_id));
        }
        bail!(
            "{verb}: {} without an error of the specification: {}{}",
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        )
    }
}

fn plugins(list: &Value) -> Result<&Vec<Value>> {
    list["plugins"].as_array().context("the CNI configuration has no plugins")
}

/// What one plugin of a list gets: its own part, with the name and version of the list and the previous result.
fn configuration(list: &Value, plugin: &Value, previous: Option<&Value>) -> Value {
    let mut configuration = plugin.clone();
    configuration["cniVersion"] = list["cniVersion"].clone();
    configuration["name"] = list["name"].clone();
    if let Some(previous) = previous {
        configuration["prevResult"] = previous.clone();
    }
    if configuration.get("runtimeConfig").is_none() && configuration["capabilities"].is_object() {
        configuration["runtimeConfig"] = json!({});
    }
    configuration
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn builds_a_plugins_configuration() {
        let list = json!({"cniVersion": "1.0.0", "name": "net", "plugins": [{"type": "a", "mtu": 1}]});
        let made = configuration(&list, &list["plugins"][0], Some(&json!({"ips": []})));
        let wanted = json!({"cniVersion": "1.0.0", "name": "net", "type": "a", "mtu": 1, "prevResult": {"ips": []}});
        assert_eq!(made, wanted);
    }
}
