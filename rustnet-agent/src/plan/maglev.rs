//! Fills Maglev tables (Eisenbud et al., "Maglev: A Fast and Reliable Software Network Load Balancer", NSDI 2016, section 3.4).
//!
//! Each backend prefers the places in an order of its own, which follows from its address alone. They take turns: in each, a backend
//! takes the free place that it prefers most. So all get as many places as the others, give or take one, and a backend that goes
//! frees its places, while nearly all others stay where they are.

use rustnet_common::addr::{Addr, Address};
use rustnet_common::hash;
use rustnet_common::maglev::PLACES;
use rustnet_common::tuple::Tuple;
use std::net::IpAddr;

/// What tells the hashes of an address apart that give the first place and the step.
const SEEDS: [u32; 2] = [0x6d61_676c, 0x6c62_2d31];
const FREE: u16 = u16::MAX;

/// A backend's order of places, and how far it is.
struct Preference {
    place: u32,
    step: u32,
}

impl Preference {
    /// That of an address; `nth`: which of its ports it is, from 0.
    fn new(addr: IpAddr, nth: u16, size: u32) -> Self {
        let key =
            Tuple { src: Addr::from(addr), dst: Addr::UNSPECIFIED, sport: nth, dport: 0, proto: 0, pad: 0, pad2: 0 };
        let [place, step] = SEEDS.map(|seed| hash::flow(&key, seed));
        // A step of 1 to size - 1 leads through all places, since the size is a prime.
        Self { place: place % size, step: step % (size - 1) + 1 }
    }

    /// The free place that it prefers most. There must be one.
    fn take(&mut self, taken: &mut [u64], size: u32) -> u32 {
        loop {
            let place = self.place;
            self.place += self.step;
            if self.place >= size {
                self.place -= size;
            }
            let (word, bit) = (&mut taken[place as usize / 64], 1 << (place % 64));
            if *word & bit == 0 {
                *word |= bit;
                return place;
            }
        }
    }
}

/// True if so many backends can have a table of this size, a prime.
pub fn fits(size: u32, backends: usize) -> bool {
    size >= 2 && backends > 0 && backends <= size as usize && backends < usize::from(FREE)
}

/// The places of a table: the ordinal of the backend that each leads to. The backends fit ([`fits`]); their addresses are in order.
pub fn fill(size: u32, backends: &[IpAddr]) -> Vec<u16> {
    let mut nth = 0;
    let preference = |(i, addr): (usize, &IpAddr)| {
        nth = if i > 0 && backends[i - 1] == *addr { nth + 1 } else { 0 };
        Preference::new(*addr, nth, size)
    };
    let mut preferences: Vec<Preference> = backends.iter().enumerate().map(preference).collect();
    let mut places = vec![FREE; size as usize];
    let mut taken = vec![0_u64; size.div_ceil(64) as usize];
    for (_, ordinal) in (0..size).zip((0..backends.len() as u16).cycle()) {
        let place = preferences[usize::from(ordinal)].take(&mut taken, size);
        places[place as usize] = ordinal;
    }
    places
}

/// The words of a table with these places, as `rn_maglev` has them.
pub fn words(places: &[u16]) -> Vec<u64> {
    let word = |places: &[u16]| places.iter().rev().fold(0, |word, place| word << 16 | u64::from(*place));
    [places.len() as u64].into_iter().chain(places.chunks(PLACES as usize).map(word)).collect()
}

#[cfg(test)]
mod tests {
    use super::{fill, fits, words};
    use rustnet_common::hash;
    use rustnet_common::maglev::{ordinal, place};
    use std::collections::BTreeSet;
    use std::net::IpAddr;

    fn backends(count: u8) -> Vec<IpAddr> {
        (0..count).map(|i| IpAddr::from([10, 244, i, 7])).collect()
    }

    /// How many places each backend has.
    fn shares(places: &[u16], count: usize) -> Vec<usize> {
        let mut shares = vec![0; count];
        for it in places {
            shares[usize::from(*it)] += 1;
        }
        shares
    }

    #[test]
    fn all_backends_have_as_many_places_give_or_take_one() {
        for (size, count) in [(251, 1), (251, 7), (16_381, 100), (251, 251)] {
            let shares = shares(&fill(size, &backends(count)), usize::from(count));
            let mean = size as usize / usize::from(count);
            assert!(shares.iter().all(|share| (mean..=mean + 1).contains(share)), "{size} {count}: {shares:?}");
        }
    }

    #[test]
    fn what_no_table_can_have_gets_none() {
        assert_eq!(
            [(251, 0), (0, 1), (2, 3), (2, 2)].map(|(size, count)| fits(size, count)),
            [false, false, false, true]
        );
        let most = usize::from(u16::MAX) - 1;
        assert!(fits(131_071, most) && !fits(131_071, most + 1));
    }

    /// All nodes of a cluster have to agree, also those of another release: these values never change.
    #[test]
    fn tables_stay_what_they_are() {
        let mixed: Vec<IpAddr> =
            ["10.244.1.2", "10.244.1.2", "10.244.2.9", "fd00::1"].map(|it| it.parse().unwrap()).into();
        assert_eq!(fill(13, &mixed), [1, 0, 2, 2, 1, 2, 3, 3, 3, 0, 0, 1, 0]);
        let places = fill(16_381, &backends(50));
        let sum = places.iter().fold(0_u32, |sum, it| sum.rotate_left(5) ^ u32::from(*it));
        assert_eq!(sum, 481_718_478);
    }

    #[test]
    fn programs_find_all_places_in_the_words() {
        for size in [5, 8, 251] {
            let places = fill(size, &backends(3));
            let words = words(&places);
            let found: Vec<u16> = (0..size)
                .map(|i| {
                    // The lowest hash that leads to this place.
                    let hash = ((u64::from(i) << 32).div_ceil(u64::from(size))) as u32;
                    assert_eq!(hash::pick(hash, size), i);
                    let (word, bits) = place(0, words[0] as u32, hash);
                    ordinal(words[word as usize], bits) as u16
                })
                .collect();
            assert_eq!(found, places);
        }
    }

    /// Places that lead elsewhere once a backend has gone, its own apart, in 10,000 of all.
    fn moved(size: u32, before: &[IpAddr], gone: IpAddr) -> usize {
        let after: Vec<IpAddr> = before.iter().copied().filter(|it| *it != gone).collect();
        let led = |backends: &[IpAddr]| -> Vec<IpAddr> {
            fill(size, backends).iter().map(|it| backends[usize::from(*it)]).collect()
        };
        let (was, is) = (led(before), led(&after));
        assert_eq!(is.iter().collect::<BTreeSet<_>>().len(), after.len(), "a backend has no place");
        was.iter().zip(&is).filter(|(was, is)| **was != gone && was != is).count() * 10_000 / size as usize
    }

    #[test]
    fn of_a_thousand_backends_one_takes_few_flows_along() {
        let all: Vec<IpAddr> = (0..1000_u16).map(|i| IpAddr::from([10, 244, (i >> 8) as u8, i as u8])).collect();
        for gone in [0, 500, 999] {
            assert!(moved(65_537, &all, all[gone]) < 100);
        }
    }

    /// On average and nearly always: in one set of some hundreds, two addresses have related orders, and more places move. By their number
    /// alone, 97 % would with 40 backends.
    #[test]
    fn few_places_move() {
        let mut number = 1_u32;
        let mut random = || {
            number = number.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            number >> 12
        };
        let mut all: Vec<usize> = (0..300)
            .map(|_| {
                let count = 2 + random() % 38;
                let set: BTreeSet<IpAddr> =
                    (0..count).map(|_| IpAddr::from([10, 244, random() as u8, random() as u8])).collect();
                let set: Vec<IpAddr> = set.into_iter().collect();
                moved(16_381, &set, set[random() as usize % set.len()])
            })
            .collect();
        all.sort_unstable();
        assert!(all.iter().sum::<usize>() < 100 * all.len() && all[all.len() * 98 / 100] < 150, "{all:?}");
    }
}
