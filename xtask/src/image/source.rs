//! Which source an image is made from: commit, time, and where it can be had.

use std::path::Path;

use anyhow::{Context, Result};
use jiff::Timestamp;

use crate::cmd::Cmd;

/// The source of a build.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Source {
    /// The commit; none outside of a clone.
    pub commit: Option<String>,
    /// Whether tracked files differ from the commit.
    pub is_changed: bool,
    /// That of `SOURCE_DATE_EPOCH`, else the commit's.
    pub time: Option<Timestamp>,
    /// Where the source can be had.
    pub url: Option<String>,
}

impl Source {
    /// Reads that of a work tree. `url` overrides that of the remote `origin`.
    pub fn read(root: &Path, url: Option<&str>) -> Result<Self> {
        let git =
            |words: &[&str]| Cmd::new("git").args(words).dir(root).capture().map(|out| out.trim().to_owned()).ok();
        let commit = git(&["rev-parse", "HEAD"]);
        let changes = git(&["status", "--porcelain", "--untracked-files=no"]);
        let time = match std::env::var("SOURCE_DATE_EPOCH") {
            Ok(text) => Some(seconds(text.trim()).context("SOURCE_DATE_EPOCH: not a number of seconds")?),
            Err(_) => git(&["log", "-1", "--format=%ct"]).and_then(|text| seconds(&text)),
        };
        let url = url.map(str::to_owned).or_else(|| public(&git(&["remote", "get-url", "origin"])?));
        Ok(Self { commit, is_changed: changes.is_some_and(|it| !it.is_empty()), time, url })
    }

    /// What the label `revision` holds: the commit, with a mark when the files differ from it.
    pub fn revision(&self) -> Option<String> {
        let mark = if self.is_changed { "-dirty" } else { "" };
        self.commit.as_ref().map(|commit| format!("{commit}{mark}"))
    }

    /// The time, as RFC 3339 writes it.
    pub fn created(&self) -> Option<String> {
        self.time.map(|time| time.to_string())
    }

    /// Names and values of the labels `org.opencontainers.image.*` that depend on the source.
    pub fn labels(&self) -> Vec<(&'static str, String)> {
        let labels = [("revision", self.revision()), ("created", self.created()), ("source", self.url.clone())];
        labels.into_iter().filter_map(|(key, value)| Some((key, value?))).collect()
    }
}

/// A time from its seconds since 1970.
fn seconds(text: &str) -> Option<Timestamp> {
    Timestamp::from_second(text.parse().ok()?).ok()
}

/// An address that others reach, without a user's name and password; a path of this machine is none.
fn public(url: &str) -> Option<String> {
    let rest = url.strip_prefix("https://")?;
    let (host, path) = rest.split_once('/')?;
    let host = host.rsplit('@').next().unwrap_or(host);
    Some(format!("https://{host}/{}", path.trim_end_matches(".git")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_public_without_its_password_or_not_at_all() {
        assert_eq!(
            public("https://ada:secret@example.org/net/rustnet.git").unwrap(),
            "https://example.org/net/rustnet"
        );
        assert_eq!(public("/srv/rustnet"), None);
        assert_eq!(public("git@example.org:net/rustnet.git"), None);
    }

    #[test]
    fn a_changed_work_tree_is_marked() {
        let source = Source { commit: Some("c0ffee".into()), is_changed: true, time: seconds("0"), url: None };
        assert_eq!(source.labels(), [("revision", "c0ffee-dirty".into()), ("created", "1970-01-01T00:00:00Z".into())]);
        assert_eq!(Source::default().labels(), []);
    }
}
