//! Where a destination lies. Contract: from an address to one [`Route`]; and for what the kernel's tables must answer, the
//! redirect that follows from them.

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::btf_maps::lpm_trie::Key;
use aya_ebpf::helpers::generated as helper;
use rustnet_common::addr::{Address, Ip4, Ip6};
use rustnet_common::conntrack::{ELSEWHERE, QUEUED};
use rustnet_common::drop::DropReason;
use rustnet_common::endpoint;
use rustnet_common::peer::{Peer, flags};
use rustnet_common::tuple::Tuple;

use super::{Packed, Stop, source};
use crate::ctx::{Ctx, Skb};
use crate::family::{Family, V4, V6};

/// Where a destination lies.
pub enum Route {
    /// A pod of this node, behind this interface; with [`QUEUED`] if packets have to pass its queue.
    Pod(u32),
    /// Behind the overlay.
    Tunnel(&'static Peer),
    /// Inside the cluster (or not to be masqueraded), reached by the kernel's routes.
    Direct,
    /// The outside world, reached by the kernel's routes.
    World,
    /// This node's own stack.
    Stack,
}

/// What a packet becomes, and what its connection knows of where that lies.
#[derive(Clone, Copy)]
pub struct Way<A> {
    /// The tuple it leaves with.
    pub to: Tuple<A>,
    /// [`rustnet_common::conntrack::CtEntry::out`] of its connection; 0 where there is none.
    pub out: u32,
}

impl<A: Address> Way<A> {
    /// Of a packet that stays as it is.
    #[inline(always)]
    pub fn unchanged(tuple: Tuple<A>) -> Self {
        Self { to: tuple, out: 0 }
    }

    /// As [`pod`], from what the connection knows where it knows it.
    #[inline(always)]
    pub fn pod(&self) -> u32 {
        if self.out == 0 { pod(self.to.dst) } else { self.out }
    }

    /// Where it leads.
    #[inline(always)]
    pub fn route<F: Family<A = A>>(&self) -> Route {
        match self.pod() {
            ELSEWHERE => beyond::<F>(self.to.dst),
            out => Route::Pod(out),
        }
    }
}

/// Interface of the pod of this node that has the address, with [`QUEUED`] if packets have to pass its queue; or [`ELSEWHERE`].
#[inline(always)]
pub fn pod<A: Address>(dst: A) -> u32 {
    match source::endpoint(dst) {
        None => ELSEWHERE,
        Some(ep) if ep.flags & endpoint::flags::QUEUED != 0 => ep.ifindex | QUEUED,
        Some(ep) => ep.ifindex,
    }
}

/// What is known of an address that is no pod of this node.
#[inline(always)]
pub fn peer<F: Family>(addr: F::A) -> Option<&'static Peer> {
    F::peers().get(&Key::new(F::BITS, addr))
}

/// Finds where an address lies that no pod of this node has.
#[inline(always)]
fn beyond<F: Family>(dst: F::A) -> Route {
    if dst.is_link_scope() {
        return Route::Stack;
    }
    match peer::<F>(dst) {
        None => Route::World,
        Some(p) if p.flags & (flags::HOST | flags::LOCAL_PODS) != 0 => Route::Stack,
        Some(p) if p.flags & flags::TUNNEL != 0 => Route::Tunnel(p),
        Some(_) => Route::Direct,
    }
}

/// `struct bpf_fib_lookup` (uapi/linux/bpf.h), with its unions as plain words.
#[repr(C)]
struct Fib {
    family: u8,
    l4_protocol: u8,
    sport: u16,
    dport: u16,
    /// In: length to check against the MTU; out: the MTU.
    tot_len: u16,
    /// In: the interface to look from; out: the one to leave by.
    ifindex: u32,
    tos: u32,
    src: [u32; 4],
    /// In: the destination; out: the next hop.
    dst: [u32; 4],
    vlan: u32,
    macs: [u16; 6],
}

/// `struct bpf_redir_neigh`.
#[repr(C)]
struct NextHop {
    family: u32,
    addr: [u32; 4],
}

const FIB_OUTPUT: u32 = 2;
const RET_SUCCESS: i64 = 0;
const RET_NO_NEIGH: i64 = 7;
const RET_FRAG_NEEDED: i64 = 8;
const MTU_FRAG_NEEDED: i64 = 1;

/// Asks the kernel's tables for the way to `to.dst` and redirects there. `len` is checked against the path's MTU;
/// `output` looks as a local sender would. [`NO_WAY`] when the kernel has none: its own stack shall say so.
#[inline(always)]
pub fn redirect<F: Family>(skb: &Skb, to: &Tuple<F::A>, len: u32, output: bool) -> Result<i32, Stop> {
    F::redirect(skb, to, len, output).result()
}

/// Declares a family's look-up as a function with global linkage, for the reason that the parser is one.
macro_rules! global {
    ($name:ident, $family:ty, $addr:ty) => {
        /// See [`redirect`].
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub extern "C" fn $name(skb: *mut __sk_buff, to: *const Tuple<$addr>, len: u32, output: u32) -> u64 {
            if to.is_null() {
                return Packed::new(Err(DropReason::NoFib.into())).bits();
            }
            // SAFETY: the callers in `family` pass a reference; the verifier checks its size.
            let to = unsafe { &*to };
            Packed::new(try_redirect::<$family>(&Skb(skb), to, len, output != 0)).bits()
        }
    };
}

global!(rn_route4, V4, Ip4);
global!(rn_route6, V6, Ip6);

/// The kernel's tables know no way.
pub const NO_WAY: i32 = -1;

#[inline(always)]
fn try_redirect<F: Family>(skb: &Skb, to: &Tuple<F::A>, len: u32, output: bool) -> Result<i32, Stop> {
    let mut fib = Fib {
        family: F::AF,
        l4_protocol: to.proto,
        sport: to.sport.to_be(),
        dport: to.dport.to_be(),
        tot_len: len as u16,
        ifindex: skb.ifindex(),
        tos: 0,
        src: to.src.words(),
        dst: to.dst.words(),
        vlan: 0,
        macs: [0; 6],
    };
    // SAFETY: `fib` has the layout and the size of the kernel's structure.
    let rc = unsafe {
        helper::bpf_fib_lookup(
            skb.raw().cast(),
            (&raw mut fib).cast(),
            size_of::<Fib>() as i32,
            if output { FIB_OUTPUT } else { 0 },
        )
    };
    match rc {
        RET_SUCCESS | RET_NO_NEIGH => {}
        RET_FRAG_NEEDED => return Err(Stop { reason: DropReason::FragNeeded, mtu: u32::from(fib.tot_len) }),
        _ => return Ok(NO_WAY),
    }
    // The family may change on the way: an IPv4 route can have an IPv6 next hop (RFC 5549).
    Ok(by_neighbour(fib.ifindex, fib.family, fib.dst))
}

/// Redirects out of an interface, to the MAC that the neighbour table has for the next hop.
#[inline(always)]
fn by_neighbour(ifindex: u32, family: u8, addr: [u32; 4]) -> i32 {
    let mut hop = NextHop { family: u32::from(family), addr };
    // SAFETY: `hop` has the layout and the size of the kernel's structure.
    unsafe { helper::bpf_redirect_neigh(ifindex, (&raw mut hop).cast(), size_of::<NextHop>() as i32, 0) as i32 }
}

/// Redirects to the pod `to.dst` out of the host's end of its veth, through the queue there, whatever the kernel's routes say:
/// the pod is its own next hop. `len` is checked against the veth's MTU; for a packet of length 0, which may be cut, the size that
/// it has. [`NO_WAY`] if it has to be cut, and `cuts` says that the caller sees to that.
#[inline(always)]
pub fn redirect_queued<F: Family>(
    skb: &Skb,
    ifindex: u32,
    to: &Tuple<F::A>,
    len: u32,
    cuts: bool,
) -> Result<i32, Stop> {
    packed_queued::<F>(skb, ifindex, to, len, cuts).result()
}

/// A function of its own for the sake of its stack frame.
#[inline(never)]
fn packed_queued<F: Family>(skb: &Skb, ifindex: u32, to: &Tuple<F::A>, len: u32, cuts: bool) -> Packed {
    Packed::new(try_queued::<F>(skb, ifindex, to.dst, len, cuts))
}

#[inline(always)]
fn try_queued<F: Family>(skb: &Skb, ifindex: u32, dst: F::A, len: u32, cuts: bool) -> Result<i32, Stop> {
    // In: nothing, so that the packet itself is measured, unless it stands for several; out: the MTU.
    let mut mtu = 0;
    // SAFETY: `mtu` is the word that the helper wants.
    let rc = unsafe { helper::bpf_check_mtu(skb.raw().cast(), ifindex, &raw mut mtu, 0, 0) };
    match rc {
        _ if rc < 0 => Err(DropReason::NoFib.into()),
        MTU_FRAG_NEEDED if len == 0 && cuts => Ok(NO_WAY),
        _ if len > mtu || (len == 0 && rc == MTU_FRAG_NEEDED) => Err(Stop { reason: DropReason::FragNeeded, mtu }),
        _ => Ok(by_neighbour(ifindex, F::AF, dst.words())),
    }
}
