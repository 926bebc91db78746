//! IP addresses as they stand in maps, and the trait by which all datapath code is generic over the family.

use crate::shared_type;

/// An IPv4 address, network order.
///
/// A union: people read octets in `bpftool map dump`, and the kernel side needs a word. The BPF
/// backend copies and compares byte arrays one byte at a time.
#[derive(Clone, Copy)]
#[repr(C)]
pub union Ip4 {
    /// The four octets as they stand on the wire.
    pub ip: [u8; 4],
    /// The same as a word, as loaded from memory.
    pub word: u32,
}

/// An IPv6 address, network order. A union for the same reason as [`Ip4`].
#[derive(Clone, Copy)]
#[repr(C)]
pub union Ip6 {
    /// The sixteen octets as they stand on the wire.
    pub ip: [u8; 16],
    /// The same as words, as loaded from memory.
    pub words: [u32; 4],
}

/// An address of either family in 16 bytes; IPv4 is stored mapped, `::ffff:a.b.c.d` (RFC 4291, 2.5.5.2).
pub type Addr = Ip6;

shared_type!(Ip4, 4);
shared_type!(Ip6, 16);

/// What the datapath needs to know of an address, whatever its family.
pub trait Address: Copy + PartialEq {
    /// Octets of the address.
    const LEN: usize;
    /// True for IPv6.
    const IS_V6: bool;
    /// The family's all-zero address.
    const UNSPECIFIED: Self;
    /// The address in 16 bytes, IPv4 as mapped.
    fn to_addr(self) -> Addr;
    /// The inverse of [`Address::to_addr`]; meaningless bits are dropped.
    fn from_addr(addr: Addr) -> Self;
    /// The four 32-bit words of the address, as loaded from memory (an IPv4 address is word 0, the others are 0).
    fn words(self) -> [u32; 4];
    /// The address as numbers of which any two addresses differ, for an order that has no meaning of its own.
    fn order(self) -> (u64, u64);
    /// Link-local unicast (IPv6), multicast or limited broadcast: packets to such an address never leave their link.
    fn is_link_scope(self) -> bool;
    /// An address that no packet on a wire may have as its source: loopback, unspecified, multicast, broadcast, and an
    /// IPv4-mapped address in an IPv6 header (RFC 1122, 3.2.1.3; RFC 4291, 2.5; RFC 6890).
    fn is_martian_source(self) -> bool;
    /// An address that no packet on a wire may have as its destination: loopback, unspecified, IPv4-mapped.
    fn is_martian_destination(self) -> bool;
}

impl Ip4 {
    /// The address as one word, as loaded from memory.
    #[inline(always)]
    pub const fn word(self) -> u32 {
        // SAFETY: both members are plain integers over the same bytes.
        unsafe { self.word }
    }

    /// The octets.
    #[inline(always)]
    pub const fn octets(self) -> [u8; 4] {
        // SAFETY: see `word`.
        unsafe { self.ip }
    }

    /// The address from a word as loaded from memory.
    #[inline(always)]
    pub const fn from_word(word: u32) -> Self {
        Self { word }
    }
}

impl PartialEq for Ip4 {
    #[inline(always)]
    fn eq(&self, other: &Self) -> bool {
        self.word() == other.word()
    }
}
impl Eq for Ip4 {}

impl Address for Ip4 {
    const LEN: usize = 4;
    const IS_V6: bool = false;
    const UNSPECIFIED: Self = Self { word: 0 };

    #[inline(always)]
    fn to_addr(self) -> Addr {
        Ip6::from_words([0, 0, 0xffff_u32.to_be(), self.word()])
    }
    #[inline(always)]
    fn from_addr(addr: Addr) -> Self {
        Self::from_word(addr.words()[3])
    }
    #[inline(always)]
    fn words(self) -> [u32; 4] {
        [self.word(), 0, 0, 0]
    }
    #[inline(always)]
    fn order(self) -> (u64, u64) {
        (u64::from(self.word()), 0)
    }
    #[inline(always)]
    fn is_link_scope(self) -> bool {
        let word = u32::from_be(self.word());
        word >> 28 == 0xe || word == u32::MAX
    }
    #[inline(always)]
    fn is_martian_source(self) -> bool {
        self.is_link_scope() || self.is_martian_destination()
    }
    #[inline(always)]
    fn is_martian_destination(self) -> bool {
        matches!(u32::from_be(self.word()) >> 24, 0 | 127)
    }
}

impl Ip6 {
    /// The address from four words as loaded from memory.
    #[inline(always)]
    pub const fn from_words(words: [u32; 4]) -> Self {
        Self { words }
    }

    /// The address as two numbers, which fit into registers: arguments of functions that take no pointers.
    #[inline(always)]
    pub fn halves(self) -> (u64, u64) {
        let w = self.words();
        (u64::from(w[0]) << 32 | u64::from(w[1]), u64::from(w[2]) << 32 | u64::from(w[3]))
    }

    /// The inverse of [`Ip6::halves`].
    #[inline(always)]
    pub const fn from_halves(high: u64, low: u64) -> Self {
        Self::from_words([(high >> 32) as u32, high as u32, (low >> 32) as u32, low as u32])
    }

    /// The octets.
    #[inline(always)]
    pub const fn octets(self) -> [u8; 16] {
        // SAFETY: both members are plain integers over the same bytes.
        unsafe { self.ip }
    }

    /// A copy made of four word loads: what a reader of packet memory wants, instead of a call to `memmove`.
    #[inline(always)]
    #[must_use]
    pub fn by_word(&self) -> Self {
        Self { words: self.words() }
    }

    /// True if these bytes hold a mapped IPv4 address.
    #[inline(always)]
    pub fn is_v4(self) -> bool {
        let w = self.words();
        w[0] == 0 && w[1] == 0 && w[2] == 0xffff_u32.to_be()
    }
}

impl PartialEq for Ip6 {
    #[inline(always)]
    fn eq(&self, other: &Self) -> bool {
        let (a, b) = (self.words(), other.words());
        ((a[0] ^ b[0]) | (a[1] ^ b[1]) | (a[2] ^ b[2]) | (a[3] ^ b[3])) == 0
    }
}
impl Eq for Ip6 {}

impl Address for Ip6 {
    const LEN: usize = 16;
    const IS_V6: bool = true;
    const UNSPECIFIED: Self = Self { words: [0; 4] };

    #[inline(always)]
    fn to_addr(self) -> Addr {
        self
    }
    #[inline(always)]
    fn from_addr(addr: Addr) -> Self {
        addr
    }
    #[inline(always)]
    fn words(self) -> [u32; 4] {
        // SAFETY: see `octets`.
        unsafe { self.words }
    }
    #[inline(always)]
    fn order(self) -> (u64, u64) {
        self.halves()
    }
    #[inline(always)]
    fn is_link_scope(self) -> bool {
        let first = u32::from_be(self.words()[0]);
        first >> 24 == 0xff || first >> 22 == 0xfe80 >> 6
    }
    #[inline(always)]
    fn is_martian_source(self) -> bool {
        u32::from_be(self.words()[0]) >> 24 == 0xff || self.is_martian_destination()
    }
    #[inline(always)]
    fn is_martian_destination(self) -> bool {
        let w = self.words();
        // ::, ::1 and ::ffff:0:0/96.
        w[0] | w[1] == 0 && (self.is_v4() || (w[2] == 0 && matches!(u32::from_be(w[3]), 0 | 1)))
    }
}

impl core::fmt::Debug for Ip4 {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        core::fmt::Display::fmt(&core::net::Ipv4Addr::from(self.octets()), f)
    }
}
impl core::fmt::Debug for Ip6 {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        core::fmt::Display::fmt(&core::net::Ipv6Addr::from(self.octets()), f)
    }
}

#[cfg(feature = "user")]
mod std_net {
    use super::{Addr, Address, Ip4, Ip6};
    use core::hash::{Hash, Hasher};
    use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

    impl Hash for Ip4 {
        fn hash<H: Hasher>(&self, state: &mut H) {
            self.octets().hash(state);
        }
    }
    impl Hash for Ip6 {
        fn hash<H: Hasher>(&self, state: &mut H) {
            self.octets().hash(state);
        }
    }
    impl PartialOrd for Ip4 {
        fn partial_cmp(&self, other: &Self) -> Option<core::cmp::Ordering> {
            Some(self.cmp(other))
        }
    }
    impl Ord for Ip4 {
        fn cmp(&self, other: &Self) -> core::cmp::Ordering {
            self.octets().cmp(&other.octets())
        }
    }
    impl PartialOrd for Ip6 {
        fn partial_cmp(&self, other: &Self) -> Option<core::cmp::Ordering> {
            Some(self.cmp(other))
        }
    }
    impl Ord for Ip6 {
        fn cmp(&self, other: &Self) -> core::cmp::Ordering {
            self.octets().cmp(&other.octets())
        }
    }
    impl From<Ipv4Addr> for Ip4 {
        fn from(a: Ipv4Addr) -> Self {
            Self { ip: a.octets() }
        }
    }
    impl From<Ip4> for Ipv4Addr {
        fn from(a: Ip4) -> Self {
            a.octets().into()
        }
    }
    impl From<Ipv6Addr> for Ip6 {
        fn from(a: Ipv6Addr) -> Self {
            Self { ip: a.octets() }
        }
    }
    impl From<Ip6> for Ipv6Addr {
        fn from(a: Ip6) -> Self {
            a.octets().into()
        }
    }
    impl From<IpAddr> for Addr {
        fn from(a: IpAddr) -> Self {
            match a {
                IpAddr::V4(a) => Ip4::from(a).to_addr(),
                IpAddr::V6(a) => a.into(),
            }
        }
    }
    impl From<Addr> for IpAddr {
        fn from(a: Addr) -> Self {
            if a.is_v4() { Self::V4(Ip4::from_addr(a).into()) } else { Self::V6(a.into()) }
        }
    }
}

#[cfg(all(test, feature = "user"))]
mod tests {
    use super::{Address, Ip4, Ip6};
    use std::net::{Ipv4Addr, Ipv6Addr};

    /// Scope of the link, martian as a source, martian as a destination.
    fn kinds(ip: impl Address) -> [bool; 3] {
        [ip.is_link_scope(), ip.is_martian_source(), ip.is_martian_destination()]
    }

    #[test]
    fn kinds_of_ipv4_addresses() {
        for (ip, want) in [
            ("10.244.1.2", [false; 3]),
            ("169.254.1.1", [false; 3]),
            ("223.255.255.255", [false; 3]),
            ("240.0.0.1", [false; 3]),
            ("0.0.0.0", [false, true, true]),
            ("0.1.2.3", [false, true, true]),
            ("127.1.2.3", [false, true, true]),
            ("224.0.0.1", [true, true, false]),
            ("239.255.255.255", [true, true, false]),
            ("255.255.255.255", [true, true, false]),
        ] {
            assert_eq!(kinds(Ip4 { ip: ip.parse::<Ipv4Addr>().unwrap().octets() }), want, "{ip}");
        }
    }

    #[test]
    fn kinds_of_ipv6_addresses() {
        for (ip, want) in [
            ("fd00::1", [false; 3]),
            ("fec0::1", [false; 3]),
            ("::2", [false; 3]),
            ("::1:0:0", [false; 3]),
            ("64:ff9b::192.0.2.1", [false; 3]),
            ("fe80::1", [true, false, false]),
            ("febf:ffff::1", [true, false, false]),
            ("ff02::1", [true, true, false]),
            ("::", [false, true, true]),
            ("::1", [false, true, true]),
            ("::ffff:10.0.0.1", [false, true, true]),
        ] {
            assert_eq!(kinds(Ip6 { ip: ip.parse::<Ipv6Addr>().unwrap().octets() }), want, "{ip}");
        }
    }
}
