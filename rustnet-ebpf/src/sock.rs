//! Programs of socket calls. Where a socket of a namespace in `rn_sock_netns` connects or sends to a Service, its destination becomes
//! a backend at once, so that no packet has to be changed; what it is shown of its peer is the Service's address.
//!
//! Only what has a backend is changed. All else goes on as a packet, and the TC programs refuse or drop it, with counter and event.

mod bind;
mod trail;

use aya_ebpf::bindings::{bpf_sock, bpf_sock_addr};
use aya_ebpf::helpers::generated as helper;
use aya_ebpf::macros::{cgroup_sock, cgroup_sock_addr};
use aya_ebpf::programs::{SockAddrContext, SockContext};
use rustnet_common::addr::{Addr, Address, Ip4, Ip6};
use rustnet_common::backend::Backend;
use rustnet_common::service::scope;
use rustnet_common::socket::{Asked, CLIENT_HIGH, Led, SocketKey, netns};
use rustnet_common::tuple::{Tuple, proto};

use crate::ctx::random;
use crate::family::{Family, V4, V6};
use crate::maps;
use crate::step::{host_port, lb, route};

/// What a program returns to let the call go on.
const ALLOW: i32 = 1;

/// `TCP_ESTABLISHED`, the state of UDP sockets with a peer (include/net/tcp_states.h).
const CONNECTED: u32 = 1;

/// The loopback address that stands for all of them in the entries of node ports.
const LOOPBACK4: Ip4 = Ip4::from_word(u32::from_ne_bytes([127, 0, 0, 1]));
/// The same for IPv6.
const LOOPBACK6: Ip6 = Ip6::from_words([0, 0, 0, 1_u32.to_be()]);

/// A call on a socket: the gate to its context.
#[derive(Clone, Copy)]
struct Call(*mut bpf_sock_addr);

impl Call {
    /// IP protocol number.
    #[inline(always)]
    fn proto(self) -> u8 {
        // SAFETY: the kernel hands the program a valid context; the verifier rewrites this load.
        unsafe { (*self.0).protocol as u8 }
    }

    /// Port of the address in hand, host order.
    #[inline(always)]
    fn port(self) -> u16 {
        // SAFETY: as above. The port is in network order in the lower half.
        u16::from_be(unsafe { (*self.0).user_port } as u16)
    }

    #[inline(always)]
    fn set_port(self, port: u16) {
        // SAFETY: as above; all hooks here may write the address.
        unsafe { (*self.0).user_port = u32::from(port.to_be()) }
    }

    /// The socket itself.
    #[inline(always)]
    fn sock(self) -> *mut bpf_sock {
        // SAFETY: as above; the pointer is never null.
        unsafe { (*self.0).__bindgen_anon_1.sk }
    }

    /// The kernel's number of the socket.
    #[inline(always)]
    fn cookie(self) -> u64 {
        // SAFETY: a valid context.
        unsafe { helper::bpf_get_socket_cookie(self.0.cast()) }
    }

    /// The kernel's number of the socket's network namespace.
    #[inline(always)]
    fn netns(self) -> u64 {
        // SAFETY: a valid context.
        unsafe { helper::bpf_get_netns_cookie(self.0.cast()) }
    }

    /// True for a UDP socket that is connected.
    #[inline(always)]
    fn has_peer(self) -> bool {
        let sock = self.sock();
        // SAFETY: the kernel hands the program a valid socket; the verifier wants it tested before it is read.
        !sock.is_null() && unsafe { (*sock).state } == CONNECTED
    }

    #[inline(always)]
    fn key(self, cookie: u64, addr: Addr) -> SocketKey {
        SocketKey { cookie, addr, port: self.port(), pad: 0, pad2: 0 }
    }
}

/// Where the address in hand stands in the context, by the family of the socket.
trait SocketFamily {
    /// The address, IPv4 as mapped: an IPv6 socket may use IPv4.
    fn address(call: Call) -> Addr;
    /// Changes it to one of the same family.
    fn set_address(call: Call, addr: Addr);
}

impl SocketFamily for V4 {
    #[inline(always)]
    fn address(call: Call) -> Addr {
        // SAFETY: see `Call::proto`.
        Ip4::from_word(unsafe { (*call.0).user_ip4 }).to_addr()
    }

    #[inline(always)]
    fn set_address(call: Call, addr: Addr) {
        // SAFETY: see `Call::set_port`.
        unsafe { (*call.0).user_ip4 = addr.words()[3] }
    }
}

impl SocketFamily for V6 {
    #[inline(always)]
    fn address(call: Call) -> Addr {
        // SAFETY: see `Call::proto`. Word by word, as the verifier wants it.
        unsafe {
            let words = &raw const (*call.0).user_ip6;
            let word = |n: usize| words.cast::<u32>().add(n).read_volatile();
            Ip6::from_words([word(0), word(1), word(2), word(3)])
        }
    }

    #[inline(always)]
    fn set_address(call: Call, addr: Addr) {
        let w = addr.words();
        // SAFETY: see `Call::set_port` and above.
        unsafe {
            let words = (&raw mut (*call.0).user_ip6).cast::<u32>();
            words.write_volatile(w[0]);
            words.add(1).write_volatile(w[1]);
            words.add(2).write_volatile(w[2]);
            words.add(3).write_volatile(w[3]);
        }
    }
}

/// The flags of the socket's namespace; `None` for sockets that keep their addresses.
#[inline(always)]
fn flags_of(namespace: u64) -> Option<u32> {
    // SAFETY: a map value stays readable for this run of the program.
    maps::rn_sock_netns.get_ptr(namespace).map(|flags| unsafe { *flags })
}

/// Where a call is led.
struct Target {
    addr: Addr,
    port: u16,
    /// Id of the backend; 0 for a pod that has a port of this host.
    backend: u32,
}

impl Target {
    #[inline(always)]
    fn of(backend: &Backend) -> Self {
        Self { addr: backend.addr, port: backend.port, backend: backend.id }
    }
}

/// What is asked for, and by which network namespace.
struct Asking {
    addr: Addr,
    port: u16,
    proto: u8,
    /// The kernel's number of the namespace.
    namespace: u64,
    /// See [`netns`].
    flags: u32,
}

/// Where a namespace is led: to a backend of the Service that it asks for, or, from this host, to the pod that has a port of it. A
/// loopback address or none stands for the node ports and host ports of this host, and entries of Services have `loopback` for all of
/// them; sockets of pods mean their own. `kept`: id of the backend that the socket had, or 0.
#[inline(always)]
fn choose<F: Family>(asked: F::A, loopback: F::A, asking: &Asking, kept: u32) -> Option<Target> {
    let (is_host, is_loopback) = (asking.flags & netns::HOST != 0, asked.is_martian_destination());
    if is_loopback && !is_host {
        return None;
    }
    let dst = if is_loopback { loopback } else { asked };
    let (dport, proto) = (asking.port, asking.proto);
    if let Some(backend) = lb::kept::<F>(dst, dport, proto, scope::CLUSTER, kept) {
        return Some(Target::of(backend));
    }
    // A load balancer that is only for some clients asks the host for the address that other nodes know, and pods when they send.
    let node = maps::config().map_or(F::A::UNSPECIFIED, F::node);
    let src = if is_host { node } else { F::A::UNSPECIFIED };
    let t = Tuple { src, dst, sport: 0, dport, proto, pad: 0, pad2: 0 };
    // Of what is refused, the packets are.
    let backend = lb::select_for::<F>(&t, scope::CLUSTER, random, || (CLIENT_HIGH, asking.namespace)).ok()?;
    if let Some(backend) = backend {
        return Some(Target::of(backend));
    }
    if !is_host || !(is_loopback || route::is_host::<F>(asked)) {
        return None;
    }
    let (addr, port) = host_port::pod_at(asking.addr, dport, proto)?;
    Some(Target { addr, port, backend: 0 })
}

/// As [`choose`], for an address of either family.
#[inline(always)]
fn choose_any(asking: &Asking, kept: u32) -> Option<Target> {
    if asking.addr.is_v4() {
        choose::<V4>(Ip4::from_addr(asking.addr), LOOPBACK4, asking, kept)
    } else {
        choose::<V6>(asking.addr, LOOPBACK6, asking, kept)
    }
}

/// Leads a call to a backend, and stores what was asked for.
#[inline(always)]
fn lead<S: SocketFamily>(call: Call, cookie: u64, asking: &Asking, to: &Target) {
    let Asking { addr, port, proto, namespace, flags } = *asking;
    let value = Asked { addr, port, proto, bucket: netns::bucket(namespace, flags), backend: to.backend };
    let key = SocketKey { cookie, addr: to.addr, port: to.port, pad: 0, pad2: 0 };
    // SAFETY: a map value stays readable for this run of the program.
    let is_known = maps::rn_sock_rev.get_ptr(key).is_some_and(|known| unsafe { known.read() == value });
    if !is_known {
        trail::note(call.sock(), Led { asked: addr, to: to.addr, asked_port: port, to_port: to.port, pad: 0 });
        // A full table forgets the oldest: such a socket is shown its backend.
        let _ = maps::rn_sock_rev.insert(key, value, 0);
    }
    S::set_address(call, to.addr);
    call.set_port(to.port);
}

/// Before a connection: one backend for as long as it lasts.
#[inline(always)]
fn connect<S: SocketFamily>(call: Call) {
    let (namespace, proto) = (call.netns(), call.proto());
    if proto != proto::TCP && proto != proto::UDP {
        return;
    }
    let Some(flags) = flags_of(namespace) else { return };
    let asked = S::address(call);
    let asking = Asking { addr: asked, port: call.port(), proto, namespace, flags };
    match choose_any(&asking, 0) {
        Some(to) => {
            let cookie = call.cookie();
            if proto == proto::UDP && to.backend != 0 {
                // The peer may be named once more, for a datagram.
                let _ = maps::rn_sock_fwd.insert(call.key(cookie, asked), to.backend, 0);
            }
            lead::<S>(call, cookie, &asking, &to);
        }
        // The socket may have had this peer by way of a Service, or have tried to.
        None => forget(call.key(call.cookie(), asked)),
    }
}

/// Forgets what a socket asked for to get this address: it asks for the address itself.
#[inline(always)]
fn forget(key: SocketKey) {
    if maps::rn_sock_rev.get_ptr(key).is_some() {
        let _ = maps::rn_sock_rev.remove(key);
    }
}

/// Before a datagram of a socket that is not connected: the same backend for as long as it serves.
#[inline(always)]
fn sendmsg<S: SocketFamily>(call: Call) {
    let namespace = call.netns();
    let Some(flags) = flags_of(namespace) else { return };
    let (asked, cookie) = (S::address(call), call.cookie());
    let key = call.key(cookie, asked);
    let asking = Asking { addr: asked, port: call.port(), proto: proto::UDP, namespace, flags };
    // SAFETY: a map value stays readable for this run of the program.
    let kept = maps::rn_sock_fwd.get_ptr(key).map_or(0, |id| unsafe { *id });
    let Some(to) = choose_any(&asking, kept) else {
        // The socket may have had this address by way of a Service. One with a peer keeps the entry, by which it is ended.
        if !call.has_peer() {
            forget(key);
        }
        return;
    };
    if to.backend != kept && to.backend != 0 {
        // A full table costs a socket its backend: the next datagram chooses again.
        let _ = maps::rn_sock_fwd.insert(key, to.backend, 0);
    }
    lead::<S>(call, cookie, &asking, &to);
}

/// After a datagram, or where a socket asks for its peer: the backend's address becomes the Service's.
#[inline(always)]
fn show<S: SocketFamily>(call: Call) {
    let key = call.key(call.cookie(), S::address(call));
    let Some(asked) = maps::rn_sock_rev.get_ptr(key) else { return };
    // SAFETY: a map value stays readable for this run of the program.
    let Asked { addr, port, .. } = unsafe { asked.read() };
    S::set_address(call, addr);
    call.set_port(port);
}

/// Declares the programs of one family.
macro_rules! programs {
    ($family:ident, $connect:ident $on_connect:ident, $sendmsg:ident $on_sendmsg:ident, $recvmsg:ident $on_recvmsg:ident,
     $getpeer:ident $on_getpeer:ident) => {
        programs!(@ $family, $connect, $on_connect, connect);
        programs!(@ $family, $sendmsg, $on_sendmsg, sendmsg);
        programs!(@ $family, $recvmsg, $on_recvmsg, show);
        programs!(@ $family, $getpeer, $on_getpeer, show);
    };
    (@ $family:ident, $program:ident, $hook:ident, $steps:ident) => {
        #[cgroup_sock_addr($hook)]
        pub fn $program(ctx: SockAddrContext) -> i32 {
            $steps::<$family>(Call(ctx.sock_addr));
            ALLOW
        }
    };
}

programs!(V4, sock_connect4 connect4, sock_sendmsg4 sendmsg4, sock_recvmsg4 recvmsg4, sock_getpeer4 getpeername4);
programs!(V6, sock_connect6 connect6, sock_sendmsg6 sendmsg6, sock_recvmsg6 recvmsg6, sock_getpeer6 getpeername6);

#[cgroup_sock(sock_release)]
pub fn sock_release(ctx: SockContext) -> i32 {
    trail::forget(ctx.sock);
    ALLOW
}
