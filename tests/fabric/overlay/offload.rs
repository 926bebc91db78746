//! What a device is left to do for packets: segments and checksums.

use anyhow::{Result, ensure};
use testkit::Netns;

/// The settings of a link, as `ethtool -K` names them, and as `ethtool -k` shows them.
const OFFLOADS: [(&str, &str); 4] = [
    ("tx", "tx-checksum-ip-generic"),
    ("tso", "tx-tcp-segmentation"),
    ("gso", "generic-segmentation-offload"),
    ("gro", "generic-receive-offload"),
];

/// Switches offloads of a link on or off, and looks whether the kernel did it.
pub fn set_offloads(netns: &Netns, link: &str, on: [bool; 4]) -> Result<()> {
    let words = |on: [bool; 4]| {
        let pairs = OFFLOADS.iter().zip(on).flat_map(|((name, _), on)| [*name, if on { "on" } else { "off" }]);
        ["-K", link].into_iter().chain(pairs).collect::<Vec<_>>()
    };
    netns.exec("ethtool", &words(on))?;
    let shown = netns.exec("ethtool", &["-k", link])?;
    for ((_, name), on) in OFFLOADS.iter().zip(on) {
        let line = format!("{name}: {}", if on { "on" } else { "off" });
        ensure!(shown.lines().any(|it| it.trim().starts_with(&line)), "{link} of {}: not {line}", netns.name());
    }
    Ok(())
}

/// All that a link can be switched to: without checksums, a device segments no TCP.
pub fn all_offloads() -> impl Iterator<Item = [bool; 4]> {
    (0..16).map(|bits| [0, 1, 2, 3].map(|bit| bits >> bit & 1 == 1)).filter(|[tx, tso, ..]| *tx || !*tso)
}
