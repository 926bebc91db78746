//! Internet checksum arithmetic (RFC 1071, RFC 1624), on 32-bit words as loaded from memory.
//!
//! A sum is kept unfolded in 64 bits: no carry is lost for any packet, and the fold happens once.

use crate::addr::Address;

/// A one's-complement sum under way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sum(pub u64);

impl Sum {
    /// Adds a word.
    #[inline(always)]
    #[must_use]
    pub const fn add(self, word: u32) -> Self {
        Self(self.0 + word as u64)
    }

    /// Takes a word away.
    #[inline(always)]
    #[must_use]
    pub const fn sub(self, word: u32) -> Self {
        Self(self.0 + (!word) as u64)
    }

    /// Adds a big-endian 16-bit field that stands at an even offset, given in host order.
    #[inline(always)]
    #[must_use]
    pub const fn add16(self, value: u16) -> Self {
        self.add(value.to_be() as u32)
    }

    /// Takes a 16-bit field away, given in host order.
    #[inline(always)]
    #[must_use]
    pub const fn sub16(self, value: u16) -> Self {
        // The complement of a half word, not of the whole: 0xffff is zero in this arithmetic.
        self.add((!value.to_be()) as u32)
    }

    /// Adds an address.
    #[inline(always)]
    #[must_use]
    pub fn add_addr<A: Address>(self, a: A) -> Self {
        let w = a.words();
        let s = self.add(w[0]);
        if A::IS_V6 { s.add(w[1]).add(w[2]).add(w[3]) } else { s }
    }

    /// Takes an address away.
    #[inline(always)]
    #[must_use]
    pub fn sub_addr<A: Address>(self, a: A) -> Self {
        let w = a.words();
        let s = self.sub(w[0]);
        if A::IS_V6 { s.sub(w[1]).sub(w[2]).sub(w[3]) } else { s }
    }

    /// The sum folded to 32 bits, as `bpf_l4_csum_replace` takes a difference.
    #[inline(always)]
    pub const fn fold32(self) -> u32 {
        let s = (self.0 & 0xffff_ffff) + (self.0 >> 32);
        ((s & 0xffff_ffff) + (s >> 32)) as u32
    }

    /// The sum folded to 16 bits, in memory order, not complemented.
    #[inline(always)]
    pub const fn fold16(self) -> u16 {
        let s = self.fold32();
        let s = (s & 0xffff) + (s >> 16);
        ((s & 0xffff) + (s >> 16)) as u16
    }

    /// The checksum field, in memory order: store it as it is.
    #[inline(always)]
    pub const fn finish(self) -> u16 {
        !self.fold16()
    }
}

/// A checksum field after a difference was applied to what it covers (RFC 1624, equation 3). Field in memory order.
#[inline(always)]
pub const fn update(field: u16, diff: Sum) -> u16 {
    Sum(diff.0 + (!field) as u64).finish()
}

#[cfg(test)]
mod tests {
    use super::{Sum, update};

    /// The example of RFC 1071, section 3.
    #[test]
    fn rfc1071_example() {
        let words = [0x0001_u16, 0xf203, 0xf4f5, 0xf6f7];
        let sum = words.iter().fold(Sum::default(), |s, w| s.add16(*w));
        assert_eq!(u16::from_be(sum.fold16()), 0xddf2);
    }

    /// The example of RFC 1624, section 4: 0x5555 becomes 0x3285 in a header whose checksum was 0xdd2f.
    #[test]
    fn rfc1624_example() {
        let diff = Sum::default().sub16(0x5555).add16(0x3285);
        assert_eq!(u16::from_be(update(0xdd2f_u16.to_be(), diff)), 0x0000);
    }

    #[test]
    fn an_update_equals_a_new_sum() {
        let mut words = [0x4500_u16, 0x0054, 0x1234, 0x4000, 0x4001, 0, 0x0a00, 0x0001, 0x0a60, 0x0001];
        let full = |w: &[u16]| w.iter().fold(Sum::default(), |s, w| s.add16(*w)).finish();
        let mut field = full(&words);
        for (i, new) in [(6, 0xffff_u16), (7, 0), (8, 0x0af4), (4, 0x3f01)] {
            field = update(field, Sum::default().sub16(words[i]).add16(new));
            words[i] = new;
            assert_eq!(field, full(&words));
        }
    }
}
