//! Ports of this node that pods have (`hostPort`). Contract: finds the pod of this node that a packet to an address of this node is
//! for, by its port. Services come first: only what no Service has is asked for here.

use core::ptr::null_mut;

use rustnet_common::addr::{Addr, Address, Ip4, Ip6};
use rustnet_common::conntrack::VIA_QDISC;
use rustnet_common::host_port::{self, HostPort, HostPortKey};

use super::{lb, route};
use crate::family::{Family, V4, V6};
use crate::maps;
use crate::packet::{Flow, Packet};

/// Look-ups of one family.
pub trait HostPorts: Family {
    /// True if a pod has the port of this node which a packet asks for.
    fn is_host_port(p: &Packet<Self::A>) -> bool;
    /// True if a packet asks for a port of a Service; or, with `ports`, for a port of this node that a pod has.
    fn is_asked(p: &Packet<Self::A>, ports: bool) -> bool;
    /// Has a new flow lead to the pod that has the port of this node which its first packet asks for. False if there is none.
    fn translate_to_host_port(p: &Packet<Self::A>, flow: &mut Flow<Self::A>) -> bool;
}

/// Declares a family's functions with global linkage: what they write leaves the verifier one state, not one for each path.
macro_rules! global {
    ($family:ident, $addr:ident, $name:ident, $asked:ident) => {
        impl HostPorts for $family {
            #[inline(always)]
            fn is_host_port(p: &Packet<$addr>) -> bool {
                $name(p, null_mut()) != 0
            }
            #[inline(always)]
            fn is_asked(p: &Packet<$addr>, ports: bool) -> bool {
                $asked(p, u32::from(ports)) != 0
            }
            #[inline(always)]
            fn translate_to_host_port(p: &Packet<$addr>, flow: &mut Flow<$addr>) -> bool {
                $name(p, flow) != 0
            }
        }
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $name(p: *const Packet<$addr>, flow: *mut Flow<$addr>) -> u32 {
            // SAFETY: the only callers are above and pass references, or none; the verifier checks sizes.
            let (p, flow) = unsafe { (p.as_ref(), flow.as_mut()) };
            u32::from(p.is_some_and(|p| find::<$family>(p, flow)))
        }
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $asked(p: *const Packet<$addr>, ports: u32) -> u32 {
            // SAFETY: see above.
            let Some(p) = (unsafe { p.as_ref() }) else { return 0 };
            u32::from(lb::is_service::<$family>(&p.tuple) || (ports != 0 && $family::is_host_port(p)))
        }
    };
}

global!(V4, Ip4, rn_host_port4, rn_is_asked4);
global!(V6, Ip6, rn_host_port6, rn_is_asked6);

/// The address and port of the pod that has this port at an address of this node, for those who know that it is one.
#[inline(always)]
pub fn pod_at(addr: Addr, port: u16, proto: u8) -> Option<(Addr, u16)> {
    let (high, low) = addr.halves();
    let mut found = HostPort { pod: Addr::UNSPECIFIED, ifindex: 0, port: 0, pad: 0 };
    let is_found = rn_host_port(high, low, u32::from(port) << 8 | u32::from(proto), &raw mut found) != 0;
    is_found.then_some((found.pod, found.port))
}

/// True if a pod has the port of this node which a packet asks for; a flow is led there.
#[inline(always)]
fn find<F: Family>(p: &Packet<F::A>, flow: Option<&mut Flow<F::A>>) -> bool {
    // SAFETY: the element belongs to this CPU, TC programs do not interrupt each other, and nobody else uses the field.
    let Some(found) = F::scratch().map(|scratch| unsafe { &mut (*scratch).host_port }) else { return false };
    let (t, (high, low)) = (&p.tuple, p.tuple.dst.to_addr().halves());
    // Few ports are a pod's: the cheaper look-up comes first.
    if rn_host_port(high, low, u32::from(t.dport) << 8 | u32::from(t.proto), found) == 0 || !route::is_host::<F>(t.dst)
    {
        return false;
    }
    if let Some(flow) = flow {
        flow.lead_to(F::A::from_addr(found.pod), found.port, t);
    }
    true
}

/// 1 if a living pod has the port at this address, which is filled in then; else 0. `port`: with the protocol in the low 8 bits. Both
/// families share it.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn rn_host_port(high: u64, low: u64, port: u32, out: *mut HostPort) -> u32 {
    // SAFETY: the callers are above and pass references; the verifier checks the size.
    let Some(out) = (unsafe { out.as_mut() }) else { return 0 };
    let addr = Addr::from_halves(high, low);
    let mut key = HostPortKey { addr, port: (port >> 8) as u16, proto: port as u8, pad: 0 };
    if has_port(&key, out) {
        return 1;
    }
    // Also behind an entry that a pod has left at this address.
    key.addr = host_port::any(addr.is_v4());
    u32::from(has_port(&key, out))
}

/// True if a living pod has the port, which is filled in then.
#[inline(always)]
fn has_port(key: &HostPortKey, out: &mut HostPort) -> bool {
    let Some(entry) = maps::rn_host_ports.get_ptr(key) else { return false };
    // SAFETY: a map value stays readable for this run of the program.
    let HostPort { pod, ifindex, port, .. } = unsafe { *entry };
    (out.pod, out.ifindex, out.port) = (pod, ifindex, port);
    (route::local_pod(pod) ^ ifindex) & !VIA_QDISC == 0
}
