//! The translation of new flows. Contract: says what a pod's flow becomes: backend (DNAT), node address (hairpin, masquerade), or
//! itself.

use rustnet_common::addr::{Address, Ip4, Ip6};
use rustnet_common::config;
use rustnet_common::conntrack::flags;
use rustnet_common::drop::DropReason;

use super::lb;
use super::route::{self, Route};
use crate::family::{Family, V4, V6};
use crate::maps;
use crate::outcome::{Dropped, PackedResult};
use crate::packet::{Flow, Packet};

/// Translation of new flows of one family.
pub trait Nat: Family {
    /// Fills in what a pod's new flow becomes.
    fn translate_new(p: &Packet<Self::A>, flow: &mut Flow<Self::A>) -> PackedResult;
}

/// Declares a family's function with global linkage, for the reason that the parser is one.
macro_rules! global {
    ($family:ident, $addr:ident, $name:ident) => {
        impl Nat for $family {
            #[inline(always)]
            fn translate_new(p: &Packet<$addr>, flow: &mut Flow<$addr>) -> PackedResult {
                PackedResult::from_bits($name(p, flow))
            }
        }
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $name(p: *const Packet<$addr>, flow: *mut Flow<$addr>) -> u64 {
            // SAFETY: the only caller is above and passes references; the verifier checks sizes.
            let translated = match unsafe { (p.as_ref(), flow.as_mut()) } {
                (Some(p), Some(flow)) => translate_new::<$family>(p, flow),
                _ => Err(DropReason::Malformed),
            };
            PackedResult::new(translated.map(|()| 0).map_err(Dropped::from)).bits()
        }
    };
}

global!(V4, Ip4, rn_nat4);
global!(V6, Ip6, rn_nat6);

#[inline(always)]
fn translate_new<F: Family>(p: &Packet<F::A>, flow: &mut Flow<F::A>) -> Result<(), DropReason> {
    let Some(config) = maps::config() else { return Ok(()) };
    let to = &mut flow.to;
    if let Some(backend) = lb::select::<F>(&p.tuple, config.seed)? {
        to.tuple.dst = F::A::from_addr(backend.addr);
        to.tuple.dport = backend.port;
        flow.backend = backend.id;
        if to.tuple.dst == p.tuple.src {
            // A pod does not accept a packet from its own address: the node's stands in for it.
            flow.flags |= flags::HAIRPIN;
        }
    }
    to.egress = route::local_pod(to.tuple.dst);
    if config.flags & config::flags::MASQUERADE != 0 && route::of::<F>(to).route == Route::World {
        flow.flags |= flags::MASQ;
    }
    if flow.flags & (flags::HAIRPIN | flags::MASQ) != 0 {
        to.tuple.src = F::node(config);
        if to.tuple.src == F::A::UNSPECIFIED {
            return Err(DropReason::NoFib);
        }
    }
    Ok(())
}
