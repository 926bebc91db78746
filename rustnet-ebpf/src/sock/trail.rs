//! What a socket has in `rn_sock_rev` and `rn_sock_fwd`, to be forgotten when it closes. The kernel keeps the list with the socket: at
//! its end a socket may have no peer any more, have had several, or never have been connected.

use aya_ebpf::bindings::{BPF_SK_STORAGE_GET_F_CREATE, bpf_sock};
use aya_ebpf::helpers::generated as helper;
use core::ffi::c_void;
use core::ptr::null_mut;
use rustnet_common::socket::{Led, SocketKey, TRAIL, Trail};

use crate::ctx::masked;
use crate::maps;

const LAST: u32 = TRAIL as u32 - 1;
const _: () = assert!(TRAIL.is_power_of_two());

/// The list of a socket, which is that of a call or a program's context; null if there is none.
#[inline(always)]
fn list(sock: *mut c_void, flags: u32) -> *mut Trail {
    let map = (&raw const maps::rn_sock_led).cast_mut().cast();
    // SAFETY: a map of this kind, and a socket that the kernel handed to the program.
    unsafe { helper::bpf_sk_storage_get(map, sock, null_mut(), flags.into()) }.cast()
}

/// Notes that a socket gets entries. Without memory for the list they stay until the tables are full.
#[inline(always)]
pub(super) fn note(sock: *mut bpf_sock, led: Led) {
    let list = list(sock.cast(), BPF_SK_STORAGE_GET_F_CREATE);
    if list.is_null() {
        return;
    }
    for n in 0..TRAIL {
        // SAFETY: the value lives as long as the socket; the index is within the list.
        if unsafe { (*list).led[n] } == led {
            return;
        }
    }
    // SAFETY: as above. Two threads that send at a time may overwrite each other's element, whose entries then stay.
    unsafe {
        let next = masked::<LAST>((*list).next as usize);
        (*list).led.as_mut_ptr().add(next).write(led);
        (*list).next = next as u32 + 1;
    }
}

/// Deletes the entries of a socket that closes: the context of its program.
#[inline(always)]
pub(super) fn forget(sock: *mut bpf_sock) {
    let list = list(sock.cast(), 0);
    if list.is_null() {
        return;
    }
    // SAFETY: the kernel hands the program a valid context.
    let cookie = unsafe { helper::bpf_get_socket_cookie(sock.cast()) };
    for n in 0..TRAIL {
        // SAFETY: the value lives as long as the socket; the index is within the list.
        let Led { asked, to, asked_port, to_port, .. } = unsafe { (*list).led[n] };
        if to_port == 0 {
            break;
        }
        let key = |addr, port| SocketKey { cookie, addr, port, pad: 0, pad2: 0 };
        let _ = maps::rn_sock_rev.remove(key(to, to_port));
        let _ = maps::rn_sock_fwd.remove(key(asked, asked_port));
    }
}
