//! Whether NetworkManager manages devices of rustnet: it takes their addresses and routes away at its next decision. Its own state
//! files say so, below `/run`; a container that does not see the host's `/run` knows nothing of it.

use std::path::Path;

use rustnet_common::names::{OVERLAY_DEV, VETH_PREFIX};

use super::finding::{Finding, Level};
use crate::net::host::Host;

/// A file a device, by its index.
const DEVICES: &str = "/run/NetworkManager/devices";

/// The devices of ours that it manages, by name; `None` where it does not run, or cannot be seen.
pub fn gather(host: &Host) -> Option<Vec<String>> {
    let ours = host.links.iter().filter(|link| link.name.starts_with(VETH_PREFIX) || link.name == OVERLAY_DEV);
    managed(Path::new(DEVICES), ours.map(|link| (link.index, link.name.as_str())))
}

fn managed<'a>(dir: &Path, devices: impl Iterator<Item = (u32, &'a str)>) -> Option<Vec<String>> {
    if !dir.is_dir() {
        return None;
    }
    let is_managed = |index: u32| {
        std::fs::read_to_string(dir.join(index.to_string()))
            .is_ok_and(|text| text.lines().any(|line| line.trim() == "managed=true"))
    };
    Some(devices.filter(|(index, _)| is_managed(*index)).map(|(_, name)| name.to_owned()).collect())
}

/// Judges.
pub fn check(managed: &[String]) -> Vec<Finding> {
    let what = "NetworkManager";
    if managed.is_empty() {
        return vec![Finding::ok(what, "manages no device of rustnet's")];
    }
    let hint = format!(
        "write `[keyfile]` and `unmanaged-devices=interface-name:{VETH_PREFIX}*;interface-name:{OVERLAY_DEV}` to \
         /etc/NetworkManager/conf.d/rustnet.conf, then `nmcli general reload`"
    );
    vec![Finding::new(Level::Warning, what, format!("manages {}", managed.join(", "))).hint(hint)]
}

#[cfg(test)]
mod tests {
    use super::{check, managed};
    use crate::doctor::finding::{Level, assert_only, assert_well};

    #[test]
    fn devices_of_ours_that_it_manages_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let devices = [(7, "rnv1"), (8, "rnv2"), (9, "rnv3")];
        assert_eq!(managed(&dir.path().join("absent"), devices.into_iter()), None);
        assert_well(&check(&managed(dir.path(), devices.into_iter()).unwrap()));
        for (index, state) in [(7, "true"), (8, "false")] {
            std::fs::write(dir.path().join(index.to_string()), format!("[device]\nmanaged={state}\n")).unwrap();
        }
        let found = managed(dir.path(), devices.into_iter()).unwrap();
        assert_only(&check(&found), Level::Warning, "manages rnv1", "unmanaged-devices=interface-name:rnv*");
    }
}
