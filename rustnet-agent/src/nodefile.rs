//! Writes `node.json`, from which the CNI binary learns of its node.

use crate::install::write_atomic;
use anyhow::Context;
use rustnet_common::files::{NODE_FILE, NodeFile};
use std::path::Path;

/// Makes the run directory's `node.json` say this. Unchanged content is not written again; readers see the old or the new
/// file, never a part. Returns whether anything was written.
///
/// # Errors
/// The run directory cannot be made or written.
pub fn write(run_dir: &Path, node: &NodeFile) -> anyhow::Result<bool> {
    std::fs::create_dir_all(run_dir).with_context(|| {
        format!(
            "{}: cannot make the run directory; check --run-dir and that its file system is writable",
            run_dir.display()
        )
    })?;
    let mut text = serde_json::to_string_pretty(node).context("node.json")?;
    text.push('\n');
    write_atomic(&run_dir.join(NODE_FILE), text.as_bytes(), 0o600)
}

/// What `node.json` says now; `None` when there is none.
///
/// # Errors
/// The file cannot be read, or is not of a version that is understood.
pub fn read(run_dir: &Path) -> anyhow::Result<Option<NodeFile>> {
    let path = run_dir.join(NODE_FILE);
    let shown = path.display();
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).with_context(|| format!("{shown}: cannot read")),
    };
    let node: NodeFile = serde_json::from_str(&text)
        .with_context(|| format!("{shown}: not a node file; remove it, the agent writes it again"))?;
    anyhow::ensure!(
        node.version == NodeFile::VERSION,
        "{shown}: version {}, but this is for version {}; run agent, CNI binary and command of one release",
        node.version,
        NodeFile::VERSION
    );
    Ok(Some(node))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node() -> NodeFile {
        NodeFile {
            version: NodeFile::VERSION,
            node_name: "n1".to_owned(),
            pod_cidrs: vec!["10.244.1.0/24".parse().expect("net")],
            mtu: 1450,
            not_ready: None,
        }
    }

    #[test]
    fn what_is_written_is_read_and_written_once() {
        let dir = tempfile::tempdir().expect("dir");
        let run = dir.path().join("run/rustnet");
        assert_eq!(read(&run).expect("none yet"), None);
        assert!(write(&run, &node()).expect("written"));
        assert_eq!(read(&run).expect("read"), Some(node()));
        assert!(!write(&run, &node()).expect("unchanged"));
        let changed = NodeFile { not_ready: Some("no pod range".to_owned()), ..node() };
        assert!(write(&run, &changed).expect("written"));
        assert_eq!(read(&run).expect("read"), Some(changed));
        assert_eq!(std::fs::read_dir(&run).expect("dir").count(), 1, "nothing temporary is left");
    }

    #[test]
    fn foreign_content_is_refused_by_name() {
        let dir = tempfile::tempdir().expect("dir");
        std::fs::write(dir.path().join(NODE_FILE), "{").expect("written");
        assert!(read(dir.path()).expect_err("broken").to_string().contains(NODE_FILE));
        let newer = serde_json::to_string(&NodeFile { version: 99, ..node() }).expect("json");
        std::fs::write(dir.path().join(NODE_FILE), newer).expect("written");
        assert!(read(dir.path()).expect_err("newer").to_string().contains("version 99"));
    }
}
