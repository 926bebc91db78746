//! The packet mark. Contract: the only step that reads or writes a packet's mark. A marked packet has passed its steps on this
//! node, and the next hook passes it on.
//!
//! A bridge to v1 runs side by side with programs of v1, which have a mark of their own. It sets both and accepts either. The
//! agent of v1 overwrites the setting, so that nothing but its own mark counts there until its programs are on all hooks.

use rustnet_common::config::NodeConfig;
use rustnet_common::v1;

use super::migrate;
use crate::ctx::Skb;
use crate::maps;

/// True if an earlier hook on this node has processed the packet.
#[inline(always)]
pub fn is_processed(skb: &Skb) -> bool {
    maps::config().is_some_and(|config| is_marked(config, skb.mark()))
}

/// As [`is_processed`]; clears the mark.
#[inline(always)]
pub fn take_processed(skb: &Skb) -> bool {
    let Some(config) = maps::config() else { return false };
    let mark = skb.mark();
    if !is_marked(config, mark) {
        return false;
    }
    let ours = if has_mark(config) { config.unmarked(mark) } else { mark };
    skb.set_mark(if migrate::is_from_v1() { ours & !v1::MARK } else { ours });
    true
}

/// Marks the packet as processed on this node.
#[inline(always)]
pub fn set_processed(skb: &Skb, config: &NodeConfig) {
    let mark = skb.mark();
    let ours = if has_mark(config) { config.marked(mark) } else { mark };
    skb.set_mark(if migrate::is_from_v1() { ours | v1::MARK } else { ours });
}

#[inline(always)]
fn is_marked(config: &NodeConfig, mark: u32) -> bool {
    config.is_marked(mark) || (migrate::is_from_v1() && mark & v1::MARK != 0)
}

/// True if the setting is one of this release. Without a bridge it always is.
#[inline(always)]
fn has_mark(config: &NodeConfig) -> bool {
    !migrate::is_from_v1() || config.mark & !config.mark_mask == 0
}
