//! Service load-balancing. Contract: from what a packet asks for to the backend that shall have it, or the reason why none
//! does. The choice depends on the flow's hash alone, so that any node, or this one after it forgot, chooses alike.

use rustnet_common::addr::Address;
use rustnet_common::config::NodeConfig;
use rustnet_common::conntrack::CtEntry;
use rustnet_common::drop::DropReason;
use rustnet_common::hash;
use rustnet_common::service::{SvcKey, flags, scope};
use rustnet_common::tuple::Tuple;

use crate::family::Family;
use crate::maps;

/// True if the address is a VIP of ours, whatever the port.
#[inline(always)]
pub fn is_vip<F: Family>(addr: F::A) -> bool {
    let key = SvcKey { vip: addr, port: 0, proto: 0, scope: scope::CLUSTER };
    F::services().get_ptr(key).is_some()
}

/// True if a flow asks for a port that a VIP has.
#[inline(always)]
pub fn is_service<F: Family>(t: &Tuple<F::A>) -> bool {
    let key = SvcKey { vip: t.dst, port: t.dport, proto: t.proto, scope: scope::CLUSTER };
    F::services().get_ptr(key).is_some()
}

/// Chooses the backend of a new flow and sends the flow there; false if it asks for no service.
#[inline(always)]
pub fn select<F: Family>(t: &Tuple<F::A>, config: &NodeConfig, half: &mut CtEntry<F::A>) -> Result<bool, DropReason> {
    let key = SvcKey { vip: t.dst, port: t.dport, proto: t.proto, scope: scope::CLUSTER };
    let Some(entry) = F::services().get_ptr(key) else {
        return if is_vip::<F>(t.dst) { Err(DropReason::NoServicePort) } else { Ok(false) };
    };
    // SAFETY: the value stays valid for this run; an update by user space replaces the whole element.
    let (first, count, svc_flags) = unsafe { ((*entry).first, (*entry).count, (*entry).flags) };
    if count == 0 {
        return Err(if svc_flags & flags::DROP_EMPTY != 0 {
            DropReason::NoLocalBackend
        } else {
            DropReason::NoBackend
        });
    }
    let index = first.wrapping_add(hash::pick(hash::flow(t, config.seed), count));
    let b = maps::rn_backends.get(index).ok_or(DropReason::BackendLookupFailed)?;
    if b.id == 0 {
        return Err(DropReason::BackendLookupFailed);
    }
    half.to.dst = F::A::from_addr(b.addr);
    half.to.dport = b.port;
    half.backend = b.id;
    Ok(true)
}
