//! What the CNI binary reads: `node.json`, and then the CNI configuration, whose presence makes the runtime call.

use anyhow::Result;
use rustnet_common::files::NodeFile;

use crate::config::Config;
use crate::{install, nodefile};

/// The files as this agent has written them.
#[derive(Debug, Default)]
pub struct Files {
    /// What `node.json` is known to hold.
    published: Option<NodeFile>,
    /// The CNI binary and its copies when they were installed: reading them takes longer than all else here.
    installed: Option<install::Stamp>,
}

impl Files {
    /// What somebody deleted or changed is put back by the next [`Files::publish`].
    pub fn distrust(&mut self) {
        self.published = None;
    }

    /// Writes what is not there: the CNI binary, `node.json`, the CNI configuration. Where there is nothing to publish, the
    /// CNI binary is informed why.
    ///
    /// # Errors
    /// `file` if it is one; else if a file cannot be written.
    pub fn publish(&mut self, config: &Config, file: Result<NodeFile>) -> Result<()> {
        let file = match file {
            Ok(file) => file,
            Err(error) => {
                refuse(config, &error)?;
                return Err(error);
            }
        };
        if self.published.as_ref() == Some(&file) {
            return Ok(());
        }
        if self.installed.as_ref() != Some(&install::stamp(config)) {
            for path in install::binary(config)? {
                tracing::info!(path = %path.display(), "CNI binary installed");
            }
            self.installed = Some(install::stamp(config));
        }
        nodefile::write(&config.run_dir, &file)?;
        if let Some(path) = install::conflist(config)? {
            tracing::info!("{} written", path.display());
        }
        self.published = Some(file);
        Ok(())
    }
}

/// Writes for the CNI binary why there are no settings. An earlier node file stays: ADD goes on with it.
fn refuse(config: &Config, why: &anyhow::Error) -> Result<()> {
    if nodefile::read(&config.run_dir).is_ok_and(|there| there.is_some_and(|file| file.not_ready.is_none())) {
        return Ok(());
    }
    let file = NodeFile {
        version: NodeFile::VERSION,
        node_name: config.node_name.clone(),
        pod_cidrs: Vec::new(),
        mtu: 0,
        not_ready: Some(format!("{why:#}")),
    };
    nodefile::write(&config.run_dir, &file).map(drop)
}
