//! The packet log, for debugging: a line for each packet that a hook has judged. `BPF_LOG` turns it on when the programs are
//! loaded; while it is 0 the verifier removes the call.

use aya_ebpf::Global;
use aya_log_ebpf_macros::info;
use rustnet_common::addr::{Addr, Address};
use rustnet_common::drop::{DropReason, hook};
use rustnet_common::log::{FILTERS, outcome};
use rustnet_common::tuple::Tuple;

use crate::ctx::masked;
use crate::family::{Family, V4, V6};
use crate::outcome::PackedResult;
use crate::step::exec::TO_STACK;
use crate::step::route::{self, Route};

/// What the macros of aya-log take from the crate `aya_log_ebpf`. That one declares the ring buffer as a map in the `maps`
/// section, which libbpf and bpftool refuse. Here it is a BTF map of the same name, where `aya_log` looks for it.
pub mod macro_support {
    use aya_ebpf::maps::ring_buf::RingBufBytes;
    use aya_log_common::{Argument as Plain, ArgumentKind};
    pub use aya_log_common::{DefaultFormatter, DisplayHint, Field, Header, Level, LogValueLength};
    use rustnet_common::addr::{Ip4, Ip6};

    use crate::maps;

    /// Bytes that are reserved for a record.
    const RECORD: usize = 512;

    /// The ring buffer.
    pub struct Ring;
    /// See [`Ring`].
    pub static AYA_LOGS: Ring = Ring;

    impl Ring {
        /// Reserves room for a record. Always the same: the macro hides the size of a record, a constant, from the compiler, and
        /// so from the verifier, which would look at the rest once for each power of two.
        #[inline(always)]
        #[allow(clippy::unused_self, reason = "the macro calls it so")]
        pub fn reserve_bytes(&self, _size: usize, flags: u64) -> Option<RingBufBytes<'static>> {
            maps::AYA_LOGS.reserve_bytes(RECORD, flags)
        }
    }

    /// [`super::BPF_LOG`] decides.
    #[inline(always)]
    pub const fn level_enabled(_level: Level) -> bool {
        true
    }

    /// What may stand in a line. In place of aya-log's own trait, which takes addresses by value: a record of four IPv6 addresses
    /// would not fit on the stack.
    pub trait Argument {
        /// Its type, and its bytes.
        fn as_argument(&self) -> (ArgumentKind, impl AsRef<[u8]>);
    }

    /// What may stand for `{:i}`.
    pub trait IpFormatter {}

    macro_rules! plain {
        ($($type:ty),+) => {
            $(impl Argument for $type {
                #[inline(always)]
                fn as_argument(&self) -> (ArgumentKind, impl AsRef<[u8]>) {
                    Plain::as_argument(self)
                }
            })+
        };
    }
    plain!(u8, u16, u32, &str, DisplayHint);

    macro_rules! address {
        ($type:ty, $kind:ident) => {
            impl IpFormatter for &$type {}
            impl Argument for &$type {
                #[inline(always)]
                fn as_argument(&self) -> (ArgumentKind, impl AsRef<[u8]>) {
                    // SAFETY: both members are plain integers over the same bytes.
                    (ArgumentKind::$kind, unsafe { &self.ip })
                }
            }
        };
    }
    address!(Ip4, ArrU8Len4);
    address!(Ip6, ArrU8Len16);
}

/// 1 where packets are logged; set by the loader.
#[unsafe(no_mangle)]
pub static BPF_LOG: Global<u32> = Global::new(0);

/// Addresses of which a logged packet has one; set by the loader. Unspecified addresses count for nothing, and without others
/// all packets are logged.
#[unsafe(no_mangle)]
pub static BPF_LOG_FILTER: [Global<Addr>; FILTERS] = [const { Global::new(Addr::UNSPECIFIED) }; FILTERS];

/// True where packets are logged.
#[inline(always)]
pub fn is_on() -> bool {
    BPF_LOG.load() != 0
}

/// A table of names without pointers, which an object for the kernel cannot hold.
type Names<const LEN: usize, const COUNT: usize> = [[u8; LEN]; COUNT];
/// Names of hooks by their codes.
static HOOKS: Names<12, 8> = padded(&hook::NAMES);
/// Names of drop reasons by their codes; none for packets that are forwarded.
static REASONS: Names<24, 32> = reasons();
/// Names of outcomes by their codes.
static OUTCOMES: Names<8, 8> = padded(&outcome::NAMES);

const fn padded<const LEN: usize, const COUNT: usize>(names: &[&str]) -> Names<LEN, COUNT> {
    let mut out = [[b' '; LEN]; COUNT];
    let mut index = 0;
    while index < names.len() {
        out[index] = pad(names[index]);
        index += 1;
    }
    out
}

const fn reasons() -> Names<24, 32> {
    let mut out = [[b' '; 24]; 32];
    // The first is not a drop.
    let mut index = 1;
    while index < DropReason::ALL.len() {
        let reason = DropReason::ALL[index];
        out[reason as usize] = pad(reason.name());
        index += 1;
    }
    out
}

/// A name with spaces behind it.
const fn pad<const LEN: usize>(name: &str) -> [u8; LEN] {
    let mut out = [b' '; LEN];
    let mut at = 0;
    while at < name.len() {
        out[at] = name.as_bytes()[at];
        at += 1;
    }
    out
}

/// An element of a table of names; `MASK` is the highest index.
#[inline(always)]
fn name<const LEN: usize, const COUNT: usize, const MASK: u32>(
    names: &'static Names<LEN, COUNT>,
    code: u32,
) -> &'static str {
    const { assert!(MASK as usize == COUNT - 1) };
    // SAFETY: the mask keeps the index inside the table, which holds ASCII alone.
    unsafe { core::str::from_utf8_unchecked(&*names.as_ptr().add(masked::<MASK>(code as usize))) }
}

/// Code of a packet that is not logged.
const UNWANTED: u32 = u32::MAX;

/// What became of the packet in this CPU's scratch memory: a code of [`outcome`], and above it that of the reason for a drop. Or
/// [`UNWANTED`].
#[inline(always)]
fn judge<F: Family>(result: PackedResult) -> u32 {
    let Some(scratch) = F::scratch() else { return UNWANTED };
    // SAFETY: the element belongs to this CPU, TC programs do not interrupt each other, and the hook is done with it.
    let (t, flow) = unsafe { (&(*scratch).packet.tuple, &(*scratch).flow) };
    if !is_wanted(t, &flow.to.tuple) {
        return UNWANTED;
    }
    match result.result() {
        Err(dropped) => outcome::DROP | u32::from(dropped.reason as u8) << 8,
        Ok(TO_STACK) => outcome::PASS,
        Ok(_) => match route::of::<F>(&flow.to, flow.flags).route {
            Route::Pod => outcome::POD,
            Route::Tunnel => outcome::TUNNEL,
            Route::Direct => outcome::DIRECT,
            Route::World => outcome::WORLD,
            Route::Stack => outcome::PASS,
        },
    }
}

/// True if a packet is logged that goes from `from` to `to`.
#[inline(always)]
fn is_wanted<A: Address>(from: &Tuple<A>, to: &Tuple<A>) -> bool {
    let mut has_filter = false;
    for filter in &BPF_LOG_FILTER {
        let filter = filter.load();
        if filter == Addr::UNSPECIFIED {
            continue;
        }
        has_filter = true;
        for address in [from.src, from.dst, to.src, to.dst] {
            if address.to_addr() == filter {
                return true;
            }
        }
    }
    !has_filter
}

/// The log of one family.
pub trait Log: Family {
    /// Logs the packet in this CPU's scratch memory, and clears it: a hook may pass the next packet without a look at its flow.
    fn log(result: PackedResult, ifindex: u32, hook: u8);
}

/// Declares a family's log as functions with global linkage, for the reason that the parser is one.
macro_rules! global {
    ($family:ident, $name:ident, $judge:ident) => {
        impl Log for $family {
            #[inline(always)]
            fn log(result: PackedResult, ifindex: u32, hook: u8) {
                $name(result.bits(), ifindex, u32::from(hook));
            }
        }
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $name(result: u64, ifindex: u32, hook: u32) -> u32 {
            let Some(scratch) = $family::scratch() else { return 0 };
            let judged = $judge(result);
            // SAFETY: as in `judge`.
            let (t, to) = unsafe { (&mut (*scratch).packet.tuple, &mut (*scratch).flow.to.tuple) };
            if judged != UNWANTED {
                info!(
                    (),
                    "{} {} protocol {} {:i}:{} -> {:i}:{} becomes {:i}:{} -> {:i}:{} {} {}",
                    name::<12, 8, 7>(&HOOKS, hook),
                    ifindex,
                    t.proto,
                    &t.src,
                    t.sport,
                    &t.dst,
                    t.dport,
                    &to.src,
                    to.sport,
                    &to.dst,
                    to.dport,
                    name::<8, 8, 7>(&OUTCOMES, judged),
                    name::<24, 32, 31>(&REASONS, judged >> 8)
                );
            }
            t.clear();
            to.clear();
            0
        }
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $judge(result: u64) -> u32 {
            judge::<$family>(PackedResult::from_bits(result))
        }
    };
}

global!(V4, rn_log4, rn_log_judge4);
global!(V6, rn_log6, rn_log_judge6);
