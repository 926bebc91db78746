//! `rn_source_ranges`: which clients outside may use a load balancer's address (`loadBalancerSourceRanges`).

use crate::addr::Addr;
use crate::shared_type;

/// Key of `rn_source_ranges`, as a longest-prefix-match trie wants it. All but the client's address counts in full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct SourceRangeKey {
    /// Length of the prefix in bits, see [`prefix_len`].
    pub prefix_len: u32,
    /// The prefix.
    pub data: SourceRange,
}

/// The prefix of a [`SourceRangeKey`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct SourceRange {
    /// The load balancer's address, IPv4 as mapped.
    pub vip: Addr,
    /// Port, host order.
    pub port: u16,
    /// IP protocol number.
    pub proto: u8,
    /// Zero.
    pub pad: u8,
    /// The range, IPv4 as mapped; for a look-up, the client.
    pub client: Addr,
}

/// The value of each range.
pub const ALLOWED: u32 = 1;
/// Bits of a prefix before the client.
const BEFORE_CLIENT: u32 = (16 + 4) * 8;
/// Bits of a mapped address before the IPv4 address.
const MAPPED: u32 = 96;
/// Length of the prefix for a look-up.
pub const FULL: u32 = BEFORE_CLIENT + 128;

/// Length of the prefix for a range of this length.
pub const fn prefix_len(is_v4: bool, len: u8) -> u32 {
    BEFORE_CLIENT + if is_v4 { MAPPED } else { 0 } + len as u32
}

/// Length of the range of a prefix, the inverse of [`prefix_len`]; `None` for a length that no range has.
pub fn range_len(is_v4: bool, prefix_len: u32) -> Option<u8> {
    let before = if is_v4 { BEFORE_CLIENT + MAPPED } else { BEFORE_CLIENT };
    prefix_len.checked_sub(before).filter(|len| *len <= FULL - before).map(|len| len as u8)
}

shared_type!(SourceRange, 36);
shared_type!(SourceRangeKey, 40);
