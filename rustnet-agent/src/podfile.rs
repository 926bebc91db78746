//! `pods.json` in the run directory: the names of this node's pods by address, for the `rustnetctl`
//! command. The agent writes it from what its source says; the CNI binary's records have names only
//! from runtimes that pass them.

use crate::model::Pod;
use crate::namefile;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::Path;

/// Name of the file.
pub const FILE: &str = "pods.json";

/// `namespace/name` by address.
pub type Names = BTreeMap<IpAddr, String>;

/// The names of these pods. Those that use the host's network have no address of their own.
pub fn names<'a>(pods: impl Iterator<Item = &'a Pod>) -> Names {
    let own = pods.filter(|pod| !pod.host_network);
    own.flat_map(|pod| pod.addresses.iter().map(|ip| (*ip, pod.name.to_string()))).collect()
}

/// Makes the file say this; unchanged content is not written again.
///
/// # Errors
/// The run directory cannot be written.
pub fn write(run_dir: &Path, names: &Names) -> anyhow::Result<bool> {
    namefile::write(run_dir, FILE, names)
}

/// What the file says; nothing where there is none.
///
/// # Errors
/// The file cannot be read.
pub fn read(run_dir: &Path) -> anyhow::Result<Names> {
    namefile::read(run_dir, FILE)
}

#[cfg(test)]
mod tests {
    use super::{FILE, names, read, write};
    use crate::model::{ObjectName, Pod};
    use std::net::IpAddr;

    fn pod(name: &str, address: &str, host_network: bool) -> Pod {
        let addresses = [address.parse::<IpAddr>().unwrap()].into();
        Pod {
            name: ObjectName::namespaced("shop", name),
            uid: "u".into(),
            node: "n1".into(),
            addresses,
            host_network,
            host_ports: false,
            socket_lb: None,
            labels: crate::model::Labels::default(),
            ports: Box::default(),
            problems: Box::default(),
        }
    }

    #[test]
    fn pods_with_an_address_of_their_own_are_named() {
        let run = tempfile::tempdir().unwrap();
        assert!(read(run.path()).unwrap().is_empty());
        let names = names([pod("web", "10.244.1.5", false), pod("proxy", "192.0.2.1", true)].iter());
        assert!(write(run.path(), &names).unwrap());
        assert!(!write(run.path(), &names).unwrap(), "unchanged");
        assert_eq!(read(run.path()).unwrap(), [("10.244.1.5".parse().unwrap(), "shop/web".to_owned())].into());
        std::fs::write(run.path().join(FILE), "[").unwrap();
        assert!(read(run.path()).unwrap_err().to_string().contains(FILE));
    }
}
