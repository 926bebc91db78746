//! Connections. v1 had two halves for each, whose keys were the tuples as they arrive. Now the key
//! is the canonical tuple: one entry for a flow that nothing translates, one for each direction of
//! a translated flow.

use std::collections::{HashMap, HashSet};
use std::hash::Hash;

use rustnet_common::addr::Address;
use rustnet_common::conntrack::{CtEntry, SLOT_CONTESTED, SOURCE_NONE, Side, flags, is_later};
use rustnet_common::tuple::{Tuple, proto};
use rustnet_common::v1;

/// A half of v1 with its key.
type Half<A> = (Tuple<A>, v1::CtEntry<A>);
/// An entry with its key.
type Entry<A> = (Tuple<A>, CtEntry<A>);

/// The entries of a table of v1, in any order. `is_pod`: an address is a pod's of this node; `backend` returns the present id of a
/// backend of v1.
///
/// v1 translates flows of pods and of the host alone: others are those of clients outside, which earlier releases exported without
/// their flags. They are left out.
pub fn upgrade<A>(halves: &[Half<A>], is_pod: impl Fn(A) -> bool, backend: impl Fn(u32) -> u32) -> Vec<Entry<A>>
where
    A: Address + Eq + Hash,
{
    let all: HashMap<Tuple<A>, v1::CtEntry<A>> = halves.iter().copied().collect();
    let mut done = HashSet::new();
    let mut placed: HashMap<Tuple<A>, Vec<CtEntry<A>>> = HashMap::with_capacity(halves.len());
    for (key, half) in halves {
        let asks = asking_half((*key, *half));
        let has_opener = asks.1.flags & (v1::flags::NAT | v1::flags::FROM_HOST) != v1::flags::NAT || is_pod(asks.0.src);
        if !has_opener || !done.insert(asks.0) {
            continue;
        }
        let answers = other_half(asks);
        // One of the two may have been evicted: each suffices to build the other.
        let find = |built: Half<A>| {
            all.get(&built.0).filter(|half| half.to == built.1.to).map_or(built, |half| (built.0, *half))
        };
        let (asks, answers) = (find(asks), find(answers));
        let both = Both {
            state: asks.1.state | answers.1.state,
            seen: later(asks.1.seen, answers.1.seen),
            backend: if asks.1.backend == 0 { 0 } else { backend(asks.1.backend) },
        };
        let entries = if asks.1.to == asks.0 {
            vec![both.entry(asks, [asks, answers].map(|half| side(key.proto, &half.1)))]
        } else {
            [asks, answers].map(|half| both.entry(half, [side(key.proto, &half.1), NOTHING_SENT])).into()
        };
        for (key, entry) in entries {
            place(placed.entry(key).or_default(), entry);
        }
    }
    placed
        .into_iter()
        .flat_map(|(key, entries)| {
            [0, SLOT_CONTESTED].into_iter().zip(entries).map(move |(pad, entry)| (Tuple { pad, ..key }, entry))
        })
        .collect()
}

/// Adds an entry to those of its key, which are two at most, of opposite directions. Of two for the same packets the later stays:
/// v1 had given the tuple of the other, which was over, to its flow.
fn place<A: Address>(entries: &mut Vec<CtEntry<A>>, entry: CtEntry<A>) {
    if entries.iter().any(|one| one.is_rival_of(&entry) && !is_later(entry.seen, one.seen)) {
        return;
    }
    entries.retain(|one| !one.is_rival_of(&entry));
    entries.push(entry);
}

/// A side that has sent nothing yet.
const NOTHING_SENT: Side = Side { bytes: 0, source: SOURCE_NONE, packets: 0, ifindex: 0, seq_end: 0, ack: 0 };

/// What both directions have in common.
struct Both {
    state: u8,
    seen: u32,
    backend: u32,
}

impl Both {
    /// The entry of the direction of a half.
    fn entry<A: Address>(&self, (key, half): Half<A>, sides: [Side; 2]) -> Entry<A> {
        let swapped = if key.is_swapped() { flags::SWAPPED } else { 0 };
        let entry = CtEntry {
            to: Tuple { pad: 0, pad2: 0, ..half.to },
            flags: half.flags & v1::flags::ALL | swapped,
            pad: 0,
            seen: self.seen,
            state: v1::present_state(key.proto, self.state),
            backend: self.backend,
            generation: 0,
            sides,
        };
        (key.canonical(), entry)
    }
}

/// A side of which nothing is verified or looked up: its next packet makes the programs do that.
/// The sequence numbers of TCP are taken from the first packet that is counted, so that counting
/// starts again.
fn side<A>(proto: u8, half: &v1::CtEntry<A>) -> Side {
    let packets = if proto == proto::TCP { 0 } else { half.packets as u32 };
    Side { bytes: half.bytes, packets, ..NOTHING_SENT }
}

/// The half of the opener: the given one, or built from the other.
fn asking_half<A: Address>((key, half): Half<A>) -> Half<A> {
    if half.flags & v1::flags::REPLY == 0 { (key, half) } else { other_half((key, half)) }
}

/// The half of the other direction, built from this one.
fn other_half<A: Address>((key, half): Half<A>) -> Half<A> {
    let flags = half.flags ^ v1::flags::REPLY;
    (
        half.to.reversed(),
        v1::CtEntry { to: key.reversed(), flags, packets: 0, bytes: 0, ifindex: 0, out: 0, guard: [0; 3], ..half },
    )
}

/// The later of two times of a clock that wraps.
fn later(one: u32, other: u32) -> u32 {
    if is_later(other, one) { other } else { one }
}

/// The halves of v1 that stand for these entries, in any order. Backends keep their ids: v1 takes
/// them for mere numbers.
pub fn downgrade<A>(entries: &[Entry<A>]) -> Vec<Half<A>>
where
    A: Address + Eq + Hash,
{
    let mut halves: HashMap<Tuple<A>, v1::CtEntry<A>> = HashMap::with_capacity(2 * entries.len());
    let mut built = Vec::new();
    // v1 has no flows of clients outside, and would refuse their packets.
    for (key, entry) in entries.iter().filter(|(_, entry)| entry.flags & flags::EXTERNAL == 0) {
        let key = Tuple { pad: 0, ..*key };
        let arrives = if entry.flags & flags::SWAPPED == 0 { key } else { key.reversed() };
        let half = v1::CtEntry {
            to: entry.to,
            flags: entry.flags & v1::flags::ALL,
            state: v1::retired_state(entry.state),
            pad: 0,
            seen: entry.seen,
            ifindex: 0,
            backend: entry.backend,
            out: 0,
            guard: [0; 3],
            pad2: [0; 3],
            packets: entry.sides[0].packets.into(),
            bytes: entry.sides[0].bytes,
        };
        halves.insert(arrives, half);
        let (other, mut answers) = other_half((arrives, half));
        if entry.flags & flags::NAT == 0 {
            answers.packets = entry.sides[1].packets.into();
            answers.bytes = entry.sides[1].bytes;
            halves.insert(other, answers);
        } else {
            built.push((other, answers));
        }
    }
    // The other direction of a translated flow has an entry of its own, unless that was evicted.
    for (key, half) in built {
        halves.entry(key).or_insert(half);
    }
    halves.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::{Entry, Half, downgrade, upgrade};
    use bytemuck::Zeroable;
    use proptest::prelude::*;
    use rustnet_common::addr::{Address, Ip4, Ip6};
    use rustnet_common::conntrack::{CtEntry, SLOT_CONTESTED, SOURCE_NONE, flags, state};
    use rustnet_common::tuple::{Tuple, proto};
    use rustnet_common::v1::{self, flags::*};
    use std::collections::{BTreeMap, HashSet};
    use std::hash::Hash;

    /// Few addresses and ports, so that flows come into each other's way.
    fn tuple<A: Address>(seed: [u8; 4], proto: u8) -> Tuple<A> {
        let address = |n: u8| {
            let mut ip = [0; 16];
            (ip[10], ip[11], ip[12], ip[15]) = (0xff, 0xff, 10, n % 5);
            A::from_addr(Ip6 { ip })
        };
        let port = |n: u8| 1000 + u16::from(n % 6);
        Tuple {
            src: address(seed[0]),
            dst: address(seed[1]),
            sport: port(seed[2]),
            dport: port(seed[3]),
            proto,
            pad: 0,
            pad2: 0,
        }
    }

    /// A flow as the programs of v1 write it: both halves.
    fn pair<A: Address>(asks: Tuple<A>, becomes: Tuple<A>, what: &Flow) -> [Half<A>; 2] {
        let nat = if asks == becomes { 0 } else { NAT | what.flags & (HAIRPIN | MASQ) };
        let half = |to: Tuple<A>, flags, n: u64| v1::CtEntry {
            to,
            flags: flags | nat | what.flags & FROM_HOST,
            state: what.state & v1::state::ALL,
            pad: 0,
            seen: what.seen,
            ifindex: 3,
            backend: if nat == 0 { 0 } else { what.backend },
            out: 4,
            guard: [1, 2, 3],
            pad2: [0; 3],
            packets: n,
            bytes: n * 100,
        };
        [(asks, half(becomes, 0, 7)), (becomes.reversed(), half(asks.reversed(), REPLY, 9))]
    }

    #[derive(Clone, Debug)]
    struct Flow {
        asks: [u8; 4],
        becomes: Option<[u8; 4]>,
        proto: u8,
        flags: u16,
        state: u8,
        seen: u32,
        backend: u32,
    }

    fn flow() -> impl Strategy<Value = Flow> {
        let protos = prop::sample::select(vec![proto::TCP, proto::UDP, proto::ICMP, proto::SCTP]);
        (any::<[u8; 4]>(), any::<Option<[u8; 4]>>(), protos, any::<u16>(), any::<u8>(), any::<u32>(), 1..1000u32)
            .prop_map(|(asks, becomes, proto, flags, state, seen, backend)| Flow {
                asks,
                becomes,
                proto,
                flags,
                state,
                seen,
                backend,
            })
    }

    /// What a round trip has to keep.
    type Kept<A> = (Tuple<A>, u16, u8, u32, u32, u64, u64);

    fn kept<A: Address>(half: &v1::CtEntry<A>) -> Kept<A> {
        (half.to, half.flags, half.state, half.seen, half.backend, half.packets, half.bytes)
    }

    /// A table of v1 in which no two flows share a tuple, as its programs guarantee.
    fn table<A: Address + Eq + Hash>(flows: &[Flow]) -> Vec<[Half<A>; 2]> {
        let mut taken = HashSet::new();
        let mut pairs = Vec::new();
        for flow in flows {
            let asks = tuple(flow.asks, flow.proto);
            let becomes = flow.becomes.map_or(asks, |seed| tuple(seed, flow.proto));
            let two = pair(asks, becomes, flow);
            let keys = [two[0].0, two[1].0];
            if keys[0] != keys[1] && keys.iter().all(|key| !taken.contains(key)) {
                taken.extend(keys);
                pairs.push(two);
            }
        }
        pairs
    }

    fn backend(id: u32) -> u32 {
        id + 0x10_0000
    }

    fn check_round_trip<A>(flows: &[Flow])
    where
        A: Address + Eq + Hash + Ord + std::fmt::Debug,
    {
        let pairs = table(flows);
        let wanted: usize = pairs.iter().map(|[(key, asks), _]| if asks.to == *key { 1 } else { 2 }).sum();
        let halves: Vec<Half<A>> = pairs.into_iter().flatten().collect();
        let entries = upgrade(&halves, |_| true, backend);
        let keys: HashSet<(Tuple<A>, u8)> = entries.iter().map(|(key, _)| (*key, key.pad)).collect();
        assert_eq!(keys.len(), entries.len());
        for (key, entry) in &entries {
            assert_eq!(key.canonical(), Tuple { pad: 0, ..*key });
            assert_eq!((entry.to.pad, entry.sides[0].ifindex, entry.sides[0].source), (0, 0, SOURCE_NONE));
        }
        // Where v1 had an untranslated flow and another one for tuples of one key, the later stays.
        if entries.len() < wanted {
            return;
        }
        let back: BTreeMap<_, _> = downgrade(&entries).into_iter().map(|(key, half)| (key, kept(&half))).collect();
        let was: BTreeMap<_, _> = halves
            .iter()
            .map(|(key, half)| {
                let id = if half.backend == 0 { 0 } else { backend(half.backend) };
                let packets = if key.proto == proto::TCP { 0 } else { half.packets };
                (*key, kept(&v1::CtEntry { backend: id, packets, ..*half }))
            })
            .collect();
        assert_eq!(back, was);
    }

    proptest! {
        #[test]
        fn a_table_of_v1_comes_back_as_it_was(flows in prop::collection::vec(flow(), 1..40)) {
            check_round_trip::<Ip4>(&flows);
            check_round_trip::<Ip6>(&flows);
        }

        /// Each half suffices for both directions.
        #[test]
        fn an_evicted_half_is_built_from_the_other(flow in flow(), which in 0..2usize) {
            for two in table::<Ip4>(std::slice::from_ref(&flow)) {
                let translation = |entries: Vec<Entry<Ip4>>| {
                    let mut all: Vec<_> = entries
                        .into_iter()
                        .map(|(key, e)| (key, e.to, e.flags, e.state, e.seen, e.backend))
                        .collect();
                    all.sort_unstable();
                    all
                };
                prop_assert_eq!(translation(upgrade(&[two[which]], |_| true, backend)), translation(upgrade(&two, |_| true, backend)));
                let one = upgrade(&[two[which]], |_| true, backend);
                let halves: BTreeMap<_, _> = downgrade(&one[..1]).into_iter().map(|(k, h)| (k, (h.to, h.flags))).collect();
                let wanted: BTreeMap<_, _> = two.iter().map(|(k, h)| (*k, (h.to, h.flags))).collect();
                prop_assert_eq!(halves, wanted);
            }
        }
    }

    fn tcp(state: u8) -> Flow {
        let (asks, flags, seen, backend) = ([1, 2, 3, 4], 0, 50, 77);
        Flow { asks, becomes: None, proto: proto::TCP, flags, state, seen, backend }
    }

    #[test]
    fn a_flow_that_nothing_translates_is_one_entry_with_both_sides() {
        let asks: Tuple<Ip4> = tuple([1, 2, 3, 4], proto::TCP);
        for (asks, swapped) in [(asks, 0), (asks.reversed(), flags::SWAPPED)] {
            let mut two = pair(asks, asks, &tcp(1));
            two[1].1.seen = 60;
            let entries = upgrade(&two, |_| true, backend);
            let [(key, entry)] = &entries[..] else { panic!("{entries:?}") };
            assert_eq!((*key, entry.to, entry.flags), (asks.canonical(), asks, swapped));
            assert_eq!((entry.seen, entry.backend), (60, 0), "the later of the two");
            assert_eq!(entry.sides.map(|side| (side.packets, side.bytes)), [(0, 700), (0, 900)]);
        }
    }

    #[test]
    fn a_translated_flow_is_two_entries() {
        let (asks, becomes) = (tuple::<Ip4>([1, 4, 3, 4], proto::TCP), tuple([1, 0, 3, 5], proto::TCP));
        let entries = upgrade(&pair(asks, becomes, &tcp(1)), |_| true, backend);
        assert_eq!(entries.len(), 2);
        for (key, entry) in entries {
            let arrives = if entry.flags & flags::SWAPPED == 0 { key } else { key.reversed() };
            if entry.flags & flags::REPLY == 0 {
                assert_eq!((arrives, entry.to), (asks, becomes));
            } else {
                assert_eq!((arrives, entry.to), (becomes.reversed(), asks.reversed()));
            }
            assert_eq!((entry.flags & flags::NAT, entry.backend), (flags::NAT, backend(77)));
        }
    }

    #[test]
    fn two_flows_that_want_one_key_get_both_slots() {
        let key: Tuple<Ip4> = tuple([1, 2, 3, 4], proto::TCP);
        let one = pair(key, tuple([1, 3, 3, 4], proto::TCP), &tcp(0));
        let other = pair(key.reversed(), tuple([2, 0, 4, 3], proto::TCP), &tcp(0));
        let entries = upgrade(&[one, other].concat(), |_| true, backend);
        let mut slots: Vec<u8> =
            entries.iter().filter(|(k, _)| k.canonical() == key.canonical()).map(|(k, _)| k.pad).collect();
        slots.sort_unstable();
        assert_eq!(slots, [0, SLOT_CONTESTED]);
    }

    /// The answers of a service's connection that is over have the tuple of a later one to the backend itself. And the other way round.
    #[test]
    fn of_two_flows_for_the_same_packets_the_later_stays() {
        let (asks, direct) = (tuple::<Ip4>([1, 4, 3, 4], proto::TCP), tuple([1, 0, 3, 5], proto::TCP));
        for is_direct_later in [true, false] {
            let seen = |is_later| Flow { seen: if is_later { 60 } else { 50 }, ..tcp(1) };
            let service = pair(asks, direct, &seen(!is_direct_later));
            let plain = pair(direct, direct, &seen(is_direct_later));
            // What v1 wrote last stands under the tuple that both want.
            let halves = if is_direct_later {
                [&service[..1], &plain[..]].concat()
            } else {
                [&plain[..1], &service[..]].concat()
            };
            for halves in [halves.clone(), halves.into_iter().rev().collect()] {
                let entries = upgrade(&halves, |_| true, backend);
                let there: Vec<_> = entries.iter().filter(|(key, _)| key.canonical() == direct.canonical()).collect();
                let [(key, entry)] = there[..] else { panic!("{entries:?}") };
                assert_eq!((key.pad, entry.flags & flags::NAT == 0), (0, is_direct_later));
            }
        }
    }

    #[test]
    fn states_that_v1_did_not_note_are_those_that_last() {
        let key: Tuple<Ip4> = tuple([1, 2, 3, 4], proto::TCP);
        let state = |old| upgrade(&pair(key, key, &tcp(old)), |_| true, backend)[0].1.state;
        assert_eq!(state(0), 0);
        assert_eq!(state(1), state::ANSWERED | state::ESTABLISHED);
        assert_eq!(state(3), state::ANSWERED | state::ESTABLISHED | state::FIN_ORIG | state::FIN_ACKED);
        let udp = Tuple { proto: proto::UDP, ..key };
        assert_eq!(upgrade(&pair(udp, udp, &tcp(1)), |_| true, backend)[0].1.state, state::ANSWERED);
    }

    #[test]
    fn flows_of_clients_outside_neither_go_to_v1_nor_come_from_there() {
        let asks: Tuple<Ip4> = tuple([0, 1, 2, 3], proto::TCP);
        let entry = |flags| CtEntry { to: asks, flags, ..CtEntry::zeroed() };
        assert_eq!(downgrade(&[(asks, entry(flags::NAT))]).len(), 2);
        for more in [0, flags::MASQ, flags::DIRECT] {
            assert!(downgrade(&[(asks, entry(flags::NAT | flags::EXTERNAL | more))]).is_empty());
        }
        let (asks, becomes) = (tuple::<Ip4>([1, 4, 3, 4], proto::TCP), tuple([2, 0, 3, 5], proto::TCP));
        for (flags, opener, entries) in [(MASQ, None, 0), (MASQ, Some(asks.src), 2), (FROM_HOST, None, 2)] {
            let two = pair(asks, becomes, &Flow { flags, ..tcp(1) });
            for halves in [&two[..], &two[..1], &two[1..]] {
                assert_eq!(upgrade(halves, |it| Some(it) == opener, backend).len(), entries, "{flags}");
            }
        }
        let plain = pair(asks, asks, &tcp(1));
        assert_eq!(upgrade(&plain, |_| false, backend).len(), 1, "who asks a pod itself may be anybody");
    }
}
