//! The retired shapes: tables of the programs of commit 6c3bd9c, which an upgrade reads and a
//! downgrade writes.
//!
//! Nothing here changes any more. Map names that are not listed in [`RETIRED`] kept their shape.

use crate::addr::{Addr, Ip4, Ip6};
use crate::shared_type;
use crate::tuple::Tuple;

pub use crate::names::v1 as map;

/// A retired map, as the kernel describes it. The number of entries was a setting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Its name, and the name of its pin.
    pub name: &'static str,
    /// `enum bpf_map_type`.
    pub kind: u32,
    /// Octets of a key.
    pub key_size: u32,
    /// Octets of a value.
    pub value_size: u32,
    /// Creation flags.
    pub flags: u32,
}

const fn shape(name: &'static str, kind: u32, key_size: usize, value_size: usize, flags: u32) -> Shape {
    Shape { name, kind, key_size: key_size as u32, value_size: value_size as u32, flags }
}

/// `BPF_MAP_TYPE_HASH`.
const HASH: u32 = 1;
/// `BPF_MAP_TYPE_ARRAY`.
const ARRAY: u32 = 2;
/// `BPF_MAP_TYPE_LRU_HASH`.
const LRU_HASH: u32 = 9;
/// `BPF_F_NO_PREALLOC`.
const NO_PREALLOC: u32 = 1;
/// `BPF_F_MMAPABLE`.
const MMAPABLE: u32 = 1 << 10;

/// All retired maps.
pub const RETIRED: [Shape; 7] = [
    shape(map::SVC4, HASH, size_of::<SvcKey<Ip4>>(), size_of::<SvcEntry>(), NO_PREALLOC),
    shape(map::SVC6, HASH, size_of::<SvcKey<Ip6>>(), size_of::<SvcEntry>(), NO_PREALLOC),
    shape(map::BACKENDS, ARRAY, size_of::<u32>(), size_of::<Backend>(), MMAPABLE),
    shape(map::CT4, LRU_HASH, size_of::<Tuple<Ip4>>(), size_of::<CtEntry<Ip4>>(), 0),
    shape(map::CT6, LRU_HASH, size_of::<Tuple<Ip6>>(), size_of::<CtEntry<Ip6>>(), 0),
    shape(map::FRAG4, LRU_HASH, 16, 4, 0),
    shape(map::FRAG6, LRU_HASH, 40, 4, 0),
];

/// The packet mark, one bit, and a constant of these programs.
pub const MARK: u32 = 0x0100_0000;

/// The programs on hooks. Its agent replaces their pins, and leaves those of other programs.
pub const PROGRAMS: [&str; 6] = ["from_pod", "to_pod", "uplink_in", "uplink_out", "overlay_in", "overlay_out"];

/// Maps that all releases share under one name and in one shape.
pub const SHARED: [&str; 6] = ["rn_endpoints", "rn_peers4", "rn_peers6", "rn_counters", "rn_events", "rn_config"];

/// Value of `rn_ct4/6`: one half of a connection. The key is the tuple of its direction as it
/// arrives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct CtEntry<A> {
    /// What a packet of this half becomes; equal to the key where nothing is translated.
    pub to: Tuple<A>,
    /// See [`flags`].
    pub flags: u16,
    /// See [`state`]; the same in both halves.
    pub state: u8,
    /// Zero.
    pub pad: u8,
    /// Low 32 bits of jiffies when this connection was last seen.
    pub seen: u32,
    /// Interface whose source address was verified for this half; 0 makes the program verify the
    /// next packet.
    pub ifindex: u32,
    /// Id of the chosen backend, 0 where no service was involved.
    pub backend: u32,
    /// Interface that this half leads to; 0 makes the program look it up.
    pub out: u32,
    /// What was verified together with `ifindex`.
    pub guard: [u16; 3],
    /// Zero.
    pub pad2: [u16; 3],
    /// Packets of this half.
    pub packets: u64,
    /// Bytes of this half.
    pub bytes: u64,
}

/// Bits of [`CtEntry::flags`].
pub mod flags {
    /// This half is the answering direction.
    pub const REPLY: u16 = 1;
    /// `to` differs from the key.
    pub const NAT: u16 = 2;
    /// A pod that reaches itself through a VIP.
    pub const HAIRPIN: u16 = 4;
    /// The source was masqueraded by this node.
    pub const MASQ: u16 = 8;
    /// Opened by this node's host.
    pub const FROM_HOST: u16 = 16;
    /// All of them.
    pub const ALL: u16 = REPLY | NAT | HAIRPIN | MASQ | FROM_HOST;
}

/// Bits of [`CtEntry::state`].
pub mod state {
    /// The answering side has spoken.
    pub const ANSWERED: u8 = 1;
    /// FIN from the opening side.
    pub const FIN_ORIG: u8 = 2;
    /// FIN from the answering side.
    pub const FIN_REPLY: u8 = 4;
    /// RST from either side.
    pub const RST: u8 = 8;
    /// All of them.
    pub const ALL: u8 = ANSWERED | FIN_ORIG | FIN_REPLY | RST;
}

/// A state of v1 as the present one, with what v1 did not note. TCP: what was answered counts as established, and a FIN as
/// acknowledged, since these states last longest. Whose RST it was is not known.
#[inline(always)]
pub const fn present_state(protocol: u8, old: u8) -> u64 {
    use crate::conntrack::state::{ESTABLISHED, FIN_ACKED, RST_ORIG, RST_REPLY};
    let mut new = (old & SAME_STATES) as u64;
    if old & state::RST != 0 {
        new |= RST_ORIG | RST_REPLY;
    }
    if protocol == crate::tuple::proto::TCP {
        if old & state::ANSWERED != 0 {
            new |= ESTABLISHED;
        }
        if old & (state::FIN_ORIG | state::FIN_REPLY) != 0 {
            new |= FIN_ACKED;
        }
    }
    new
}

/// The inverse of [`present_state`].
#[inline(always)]
pub const fn retired_state(new: u64) -> u8 {
    use crate::conntrack::state::{RST_ORIG, RST_REPLY};
    let reset = if new & (RST_ORIG | RST_REPLY) != 0 { state::RST } else { 0 };
    new as u8 & SAME_STATES | reset
}

/// States that both releases have, at the same bits.
const SAME_STATES: u8 = state::ANSWERED | state::FIN_ORIG | state::FIN_REPLY;
const _: () = assert!({
    use crate::conntrack::state as present;
    SAME_STATES as u64 == present::ANSWERED | present::FIN_ORIG | present::FIN_REPLY
        && state::ANSWERED as u64 == present::ANSWERED
        && state::FIN_ORIG as u64 == present::FIN_ORIG
});

/// Key of `rn_svc4/6`.
pub type SvcKey<A> = crate::service::SvcKey<A>;

/// Value of `rn_svc4/6`: a range of `rn_backends`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct SvcEntry {
    /// Index of the first backend in `rn_backends`.
    pub first: u32,
    /// Backends in the range; 0 means reject (or drop).
    pub count: u32,
    /// Number of the service port.
    pub id: u32,
    /// Session affinity in seconds.
    pub affinity: u32,
    /// Bits as in [`crate::service::flags`].
    pub flags: u16,
    /// Zero.
    pub pad: u16,
}

/// Value of `rn_backends`; a service's backends stand side by side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Backend {
    /// Address; IPv4 as mapped.
    pub addr: Addr,
    /// Port, host order.
    pub port: u16,
    /// Bits as in [`crate::backend::flags`].
    pub flags: u16,
    /// Number of (service port, endpoint); 0 is no backend.
    pub id: u32,
}

shared_type!(CtEntry<Ip4>, 64);
shared_type!(CtEntry<Ip6>, 88);
shared_type!(SvcEntry, 20);
shared_type!(Backend, 24);
