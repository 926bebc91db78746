//! `rn_config`: what the programs must know of their node. One element; written by the agent.

use crate::addr::{Addr, Ip4, Ip6};
use crate::shared_type;

/// The one value of `rn_config`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct NodeConfig {
    /// This node's IPv4 address: source of masquerade, hairpin and ICMP errors. 0.0.0.0 when there is none.
    pub node4: Ip4,
    /// This node's IPv6 address, for the same. :: when there is none.
    pub node6: Ip6,
    /// This node's address of the overlay's family. No program reads it: the tunnel's near end is `node4` or `node6`.
    pub tunnel_src: Addr,
    /// Bits of a packet's mark that are rustnet's: [`NodeConfig::mark`] is compared with these bits and no others. Programs
    /// before `rn_svc4_v2` never read this word, which was the uplink's interface index.
    pub mark_mask: u32,
    /// Interface index of the overlay device, 0 in native routing.
    pub overlay: u32,
    /// What these bits hold in a packet that has passed its steps on this node: the next hook clears them and does no more. 0 means
    /// that no packet counts as marked. Programs before `rn_svc4_v2` never read this word, which was the uplink's MTU.
    pub mark: u32,
    /// Largest IP packet that fits into the overlay.
    pub overlay_mtu: u32,
    /// UDP port of the overlay, host order.
    pub overlay_port: u16,
    /// First port that masquerade may use. Programs skip [`NodeConfig::overlay_port`] where it lies in the range.
    pub snat_min: u16,
    /// Last port that masquerade may use.
    pub snat_max: u16,
    /// See [`flags`]; the upper eight bits are the [`meaning`].
    pub flags: u16,
    /// Overlay network identifier.
    pub vni: u32,
    /// Timer ticks in a second, to compare jiffies with.
    pub hz: u32,
    /// Seed of the flow hash; the same on all nodes, so that they choose alike.
    pub seed: u32,
}

impl NodeConfig {
    /// True if an earlier hook of this node has marked a packet with this mark.
    #[inline(always)]
    #[must_use]
    pub const fn is_marked(&self, mark: u32) -> bool {
        self.mark != 0 && mark & self.mark_mask == self.mark
    }

    /// A packet's mark with rustnet's bits set, the others as they were.
    #[inline(always)]
    #[must_use]
    pub const fn marked(&self, mark: u32) -> u32 {
        (mark & !self.mark_mask) | self.mark
    }

    /// Which [`meaning`] the values of the maps have.
    #[must_use]
    pub const fn meaning(&self) -> u8 {
        (self.flags >> meaning::SHIFT) as u8
    }

    /// The same settings, for maps whose values have this [`meaning`].
    #[must_use]
    pub const fn with_meaning(self, meaning: u8) -> Self {
        let low = self.flags & ((1 << meaning::SHIFT) - 1);
        Self { flags: low | (meaning as u16) << meaning::SHIFT, ..self }
    }

    /// A packet's mark with rustnet's bits cleared, the others as they were.
    #[inline(always)]
    #[must_use]
    pub const fn unmarked(&self, mark: u32) -> u32 {
        mark & !self.mark_mask
    }
}

/// The mark and its bits unless a setting names others: the bits and the value that docs/adr/0006 explains.
pub mod mark {
    /// Value of [`NodeConfig::mark`](super::NodeConfig::mark).
    pub const DEFAULT: u32 = 0x1052;
    /// Value of [`NodeConfig::mark_mask`](super::NodeConfig::mark_mask).
    pub const DEFAULT_MASK: u32 = 0x107f;
}

/// What the values of all maps mean. The shape of a map tells a release that a value grew, and its name that a map is another
/// one; this number tells that a value of the same size means something else.
///
/// A release that changes a meaning raises [`PRESENT`](meaning::PRESENT), converts what it adopts with a lower number, and
/// writes the new meaning only once no earlier program is on a hook. Programs do not read it.
pub mod meaning {
    /// This release's.
    pub const PRESENT: u8 = 0;
    /// Where it stands in [`NodeConfig::flags`](super::NodeConfig::flags).
    pub const SHIFT: u32 = 8;
}

/// Source ports of tunnel packets: the first, from which on nobody is assigned one (RFC 6335, 6; RFC 7348 recommends them).
pub const FIRST_TUNNEL_PORT: u16 = 0xc000;
/// So many of them, a power of two, for packets that the stack of a node sends or receives. Where a firewall or kubelet's rules switch
/// nf_conntrack on, each is an entry for each node: few enough for its table, enough for the queues of a NIC.
pub const NODE_TUNNEL_PORTS: u16 = 32;

/// Bits of [`NodeConfig::flags`].
pub mod flags {
    /// Pods that talk to the world get this node's address.
    pub const MASQUERADE: u16 = 1;
    /// Report new flows as events too, not only drops.
    pub const FLOW_EVENTS: u16 = 2;
    /// Packets to pods of other nodes get their tunnel headers from the programs, not from the overlay's device.
    pub const ENCAPSULATE: u16 = 4;
    /// Services have addresses for clients outside.
    pub const EXTERNAL: u16 = 8;
    /// A pod that sends what policies deny gets an ICMP error.
    pub const ANSWER_DENIED: u16 = 16;
    /// All of them.
    pub(super) const ALL: u16 = MASQUERADE | FLOW_EVENTS | ENCAPSULATE | EXTERNAL | ANSWER_DENIED;
}

shared_type!(NodeConfig, 72);
const _: () = assert!(core::mem::offset_of!(NodeConfig, mark_mask) == 36);
const _: () = assert!(core::mem::offset_of!(NodeConfig, mark) == 44);
const _: () = assert!(flags::ALL >> meaning::SHIFT == 0);

#[cfg(all(test, feature = "user"))]
mod tests {
    use super::NodeConfig;
    use super::mark::{DEFAULT, DEFAULT_MASK};

    fn config(mark: u32, mark_mask: u32) -> NodeConfig {
        NodeConfig { mark_mask, mark, ..bytemuck::Zeroable::zeroed() }
    }

    #[test]
    fn only_all_bits_of_the_mark_make_a_marked_packet() {
        let it = config(DEFAULT, DEFAULT_MASK);
        assert!(it.is_marked(DEFAULT) && it.is_marked(DEFAULT | 0xffff_ef80));
        for bit in 0..32 {
            assert!(!it.is_marked(1 << bit), "bit {bit}");
            let changed = DEFAULT ^ (1 << bit);
            assert_eq!(it.is_marked(changed), DEFAULT_MASK & (1 << bit) == 0, "bit {bit}");
        }
        assert!(!it.is_marked(0) && !it.is_marked(DEFAULT_MASK) && !it.is_marked(u32::MAX));
        assert!(!config(0, 0).is_marked(0), "a new map holds zeros");
    }

    #[test]
    fn flags_and_meaning_leave_each_other_alone() {
        let it = NodeConfig { flags: 0x0703, ..config(0, 0) };
        assert_eq!((it.meaning(), it.with_meaning(9).meaning(), it.with_meaning(0).flags), (7, 9, 3));
    }

    #[test]
    fn bits_of_others_stay() {
        let it = config(DEFAULT, DEFAULT_MASK);
        for foreign in [0, 0x4000, 0x000c_0000, 0xffff_ef80] {
            assert_eq!(it.marked(foreign), foreign | DEFAULT);
            assert_eq!(it.unmarked(it.marked(foreign)), foreign);
        }
    }

    /// Marks that others give to packets as a whole: none of them passes for ours.
    #[test]
    fn no_well_known_mark_passes_for_ours() {
        let it = config(DEFAULT, DEFAULT_MASK);
        let mullvad = 0x6d6f_6c65;
        let wg_quick = 51_820;
        let istio = [0x539, 0x111, 0x1337];
        let app_mesh = 0x1e77_00ce;
        let tailscale = [0x4_0000, 0x8_0000];
        let kubernetes = [0x4000, 0x8000, 0x2000];
        let cilium = [0x200, 0x300, 0x400, 0xa00, 0xb00, 0xc00, 0xd00, 0xe00, 0xf00, 0x1e00, 0x3d00];
        let all = [&[mullvad, wg_quick, app_mesh][..], &istio, &tailscale, &kubernetes, &cilium].concat();
        for mark in all {
            assert!(!it.is_marked(mark), "{mark:#x}");
        }
    }
}
