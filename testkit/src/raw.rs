//! The packet socket, with the unsafe code that it needs.

use anyhow::{Context, Result, bail};
use std::io::Error;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// A packet socket bound to one interface of the calling thread's network namespace.
pub(crate) struct PacketSocket {
    fd: OwnedFd,
}

/// One received frame.
pub(crate) struct Received {
    /// Bytes in the buffer.
    pub len: usize,
    /// Bytes of the whole frame.
    pub wire_len: usize,
    /// True when this interface sent it.
    pub outgoing: bool,
    /// True when the transport checksum is still to be filled in (`CHECKSUM_PARTIAL`).
    pub partial: bool,
    /// The tag control information of an outer VLAN tag, which the kernel keeps apart from the
    /// bytes.
    pub vlan: Option<u16>,
}

/// `tpacket_auxdata` of linux/if_packet.h.
#[repr(C)]
struct AuxData {
    status: u32,
    len: u32,
    snaplen: u32,
    mac: u16,
    net: u16,
    vlan_tci: u16,
    vlan_tpid: u16,
}

/// `TP_STATUS_CSUMNOTREADY` of linux/if_packet.h.
const CHECKSUM_NOT_READY: u32 = 1 << 3;
/// `TP_STATUS_VLAN_VALID` of linux/if_packet.h.
const VLAN_VALID: u32 = 1 << 4;

fn size<T>() -> libc::socklen_t {
    size_of::<T>() as libc::socklen_t
}

impl PacketSocket {
    /// Opens a socket that receives all frames of the interface.
    pub fn open(interface: &str) -> Result<Self> {
        let socket = Self::bound(interface, (libc::ETH_P_ALL as u16).to_be())?;
        socket.option(libc::SOL_PACKET, libc::PACKET_AUXDATA, 1)?;
        socket.option(libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, 64 << 20)?;
        Ok(socket)
    }

    /// Opens a socket that only sends and receives nothing, so that no thread has to read it.
    pub fn open_to_send(interface: &str) -> Result<Self> {
        Self::bound(interface, 0)
    }

    /// `protocol`: an `EtherType` in network order.
    fn bound(interface: &str, protocol: u16) -> Result<Self> {
        let index = nix::net::if_::if_nametoindex(interface).with_context(|| format!("no interface {interface}"))?;
        // SAFETY: plain system call; the descriptor is checked before it is owned.
        let fd = unsafe {
            let fd = libc::socket(
                libc::AF_PACKET,
                libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK,
                libc::c_int::from(protocol),
            );
            if fd < 0 {
                return Err(Error::last_os_error()).context("cannot open a packet socket: this needs CAP_NET_RAW");
            }
            OwnedFd::from_raw_fd(fd)
        };
        // SAFETY: all-zero is a valid value of this C structure.
        let mut address: libc::sockaddr_ll = unsafe { zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = protocol;
        address.sll_ifindex = index.cast_signed();
        // SAFETY: the address has the given length.
        if unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), size::<libc::sockaddr_ll>()) } != 0 {
            return Err(Error::last_os_error()).with_context(|| format!("cannot bind to {interface}"));
        }
        Ok(Self { fd })
    }

    fn option(&self, level: i32, name: i32, value: i32) -> Result<()> {
        // SAFETY: the value has the given length.
        let result = unsafe {
            libc::setsockopt(self.fd.as_raw_fd(), level, name, (&raw const value).cast(), size::<libc::c_int>())
        };
        if result == 0 { Ok(()) } else { Err(Error::last_os_error()).context("cannot set a packet socket's option") }
    }

    /// Sends one whole frame.
    pub fn send(&self, frame: &[u8]) -> Result<()> {
        // SAFETY: pointer and length are those of one slice.
        let sent = unsafe { libc::send(self.fd.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) };
        if sent < 0 {
            return Err(Error::last_os_error()).context("cannot send a frame");
        }
        if sent.cast_unsigned() != frame.len() {
            bail!("sent {sent} of {} bytes", frame.len());
        }
        Ok(())
    }

    /// Sends one whole frame whose checksum is left to the device: over all bytes from `start`, to be written `offset` bytes
    /// behind that. Any process with a packet socket can ask for that (`PACKET_VNET_HDR`, `struct virtio_net_hdr`).
    pub fn send_unsummed(&self, frame: &[u8], start: u16, offset: u16) -> Result<()> {
        const PACKET_VNET_HDR: i32 = 15;
        const NEEDS_CSUM: u8 = 1;
        self.option(libc::SOL_PACKET, PACKET_VNET_HDR, 1)?;
        let mut all = vec![NEEDS_CSUM, 0, 0, 0, 0, 0];
        all.extend(start.to_ne_bytes());
        all.extend(offset.to_ne_bytes());
        all.extend(frame);
        let sent = self.send(&all);
        self.option(libc::SOL_PACKET, PACKET_VNET_HDR, 0)?;
        sent
    }

    /// The next frame, or none when there is none now.
    pub fn receive(&self, buffer: &mut [u8]) -> Option<Received> {
        // SAFETY: all-zero is a valid value of these C structures.
        let (mut from, mut message): (libc::sockaddr_ll, libc::msghdr) = unsafe { (zeroed(), zeroed()) };
        let mut part = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
        // Of 64-bit words, because control messages want that alignment.
        let mut control = [0u64; 16];
        message.msg_name = (&raw mut from).cast();
        message.msg_namelen = size::<libc::sockaddr_ll>();
        message.msg_iov = &raw mut part;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = size_of::<[u64; 16]>();
        // SAFETY: every pointer in the message refers to a live local of the given length.
        let len = unsafe { libc::recvmsg(self.fd.as_raw_fd(), &raw mut message, libc::MSG_TRUNC) };
        let wire_len = usize::try_from(len).ok()?;
        let (mut partial, mut vlan) = (false, None);
        // SAFETY: the kernel filled the control buffer; the macros walk it within `msg_controllen`, and the data of this
        // type of message is the structure read, possibly unaligned.
        unsafe {
            let mut header = libc::CMSG_FIRSTHDR(&raw const message);
            while !header.is_null() {
                if (*header).cmsg_level == libc::SOL_PACKET && (*header).cmsg_type == libc::PACKET_AUXDATA {
                    let aux: AuxData = libc::CMSG_DATA(header).cast::<AuxData>().read_unaligned();
                    partial = aux.status & CHECKSUM_NOT_READY != 0;
                    vlan = (aux.status & VLAN_VALID != 0).then_some(aux.vlan_tci);
                }
                header = libc::CMSG_NXTHDR(&raw const message, header);
            }
        }
        let len = wire_len.min(buffer.len());
        Some(Received { len, wire_len, outgoing: from.sll_pkttype == libc::PACKET_OUTGOING, partial, vlan })
    }
}

impl AsFd for PacketSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// `ETHTOOL_STXCSUM` of linux/ethtool.h.
const SET_TX_CHECKSUM: u32 = 0x17;

/// Switches checksum offload on transmit of an interface in the calling thread's network namespace: without it, every
/// packet leaves with a finished checksum, which the receiver then verifies.
pub(crate) fn set_tx_checksum(interface: &str, on: bool) -> Result<()> {
    #[repr(C)]
    struct Value {
        command: u32,
        data: u32,
    }
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").context("cannot open a socket")?;
    let mut value = Value { command: SET_TX_CHECKSUM, data: u32::from(on) };
    // SAFETY: all-zero is a valid value of this C structure.
    let mut request: libc::ifreq = unsafe { zeroed() };
    if interface.len() >= request.ifr_name.len() {
        bail!("interface name {interface} is too long");
    }
    for (to, from) in request.ifr_name.iter_mut().zip(interface.bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_data = (&raw mut value).cast();
    // SAFETY: the request and the value it points to live until the call returns.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCETHTOOL, &raw mut request) } != 0 {
        return Err(Error::last_os_error()).with_context(|| format!("cannot switch checksums of {interface}"));
    }
    Ok(())
}

/// Sets how an IPv4 socket deals with the path MTU, `IP_PMTUDISC_...`.
pub(crate) fn set_mtu_discover(fd: BorrowedFd<'_>, mode: i32) -> Result<()> {
    // SAFETY: the value has the given length.
    let result = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::IPPROTO_IP,
            libc::IP_MTU_DISCOVER,
            (&raw const mode).cast(),
            size::<libc::c_int>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(Error::last_os_error()).context("cannot set IP_MTU_DISCOVER") }
}

/// Takes all privileges from the calling thread: the user and group "nobody", without capabilities.
/// By system calls, because the C library's functions change all threads of the process.
pub(crate) fn drop_privileges() -> Result<()> {
    const NOBODY: libc::c_long = 65_534;
    // SAFETY: plain system calls without pointers, but for an empty list of groups. A change of the
    // user id to another one than root's clears the thread's permitted, effective and ambient
    // capabilities.
    let failed = unsafe {
        libc::syscall(libc::SYS_setgroups, 0, std::ptr::null::<libc::gid_t>()) != 0
            || libc::syscall(libc::SYS_setresgid, NOBODY, NOBODY, NOBODY) != 0
            || libc::syscall(libc::SYS_setresuid, NOBODY, NOBODY, NOBODY) != 0
    };
    if failed { Err(Error::last_os_error()).context("cannot drop privileges") } else { Ok(()) }
}
