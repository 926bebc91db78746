//! The flow hash: the same on every node and in user space, so that a lost connection entry finds its backend again.

use crate::addr::Address;
use crate::tuple::Tuple;

/// One round of a 32-bit multiply-xorshift mixer.
#[inline(always)]
const fn mix(h: u32, w: u32) -> u32 {
    let h = (h ^ w).wrapping_mul(0x9e37_79b1);
    h ^ (h >> 15)
}

/// Hash of a flow's source and of what it asked for.
#[inline(always)]
pub fn flow<A: Address>(t: &Tuple<A>, seed: u32) -> u32 {
    let (s, d) = (t.src.words(), t.dst.words());
    let mut h = mix(mix(seed, s[0]), d[0]);
    if A::IS_V6 {
        h = mix(mix(mix(h, s[1]), s[2]), s[3]);
        h = mix(mix(mix(h, d[1]), d[2]), d[3]);
    }
    h = mix(h, (t.sport as u32) << 16 | t.dport as u32);
    h = mix(h, t.proto as u32);
    // Two closing rounds: the low bits choose backends.
    let h = (h ^ (h >> 16)).wrapping_mul(0x85eb_ca6b);
    let h = (h ^ (h >> 13)).wrapping_mul(0xc2b2_ae35);
    h ^ (h >> 16)
}

/// Maps a hash onto `0..n` without a division (Lemire's reduction).
#[inline(always)]
pub const fn pick(hash: u32, n: u32) -> u32 {
    ((hash as u64 * n as u64) >> 32) as u32
}

#[cfg(test)]
mod tests {
    use super::{flow, pick};
    use crate::addr::Ip4;
    use crate::tuple::Tuple;

    #[test]
    fn spreads_source_ports_over_backends() {
        let mut seen = [0u32; 7];
        for sport in 32768..60999 {
            let t = Tuple {
                src: Ip4 { ip: [10, 0, 0, 1] },
                dst: Ip4 { ip: [10, 96, 0, 1] },
                sport,
                dport: 80,
                proto: 6,
                pad: 0,
                pad2: 0,
            };
            seen[pick(flow(&t, 0), 7) as usize] += 1;
        }
        let mean = (60999 - 32768) / 7;
        for n in seen {
            assert!(n.abs_diff(mean) < mean / 20, "{seen:?}");
        }
    }

    #[test]
    fn pick_stays_in_range() {
        for n in 1..100 {
            assert_eq!(pick(0, n), 0);
            assert_eq!(pick(u32::MAX, n), n - 1);
        }
    }
}
