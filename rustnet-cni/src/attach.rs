//! What the agent has pinned: its programs, put on a pod's veth, and the map of endpoints.

use crate::maps::{Endpoints, obj_get};
use crate::netlink::{Message, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, Refused, Socket};
use crate::types::error::Error;
use libc::{TCA_KIND, TCA_OPTIONS};
use netlink_packet_core::Emitable;
use netlink_packet_route::tc::TcHeader;
use rustnet_common::names;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

const TC_H_CLSACT: u32 = 0xffff_fff1;
const TC_H_INGRESS: u32 = 0xffff_fff2;
const TC_H_EGRESS: u32 = 0xffff_fff3;
const CLSACT_HANDLE: u32 = 0xffff_0000;
const TCA_BPF_FD: u16 = 6;
const TCA_BPF_NAME: u16 = 7;
const TCA_BPF_FLAGS: u16 = 8;
const TCA_BPF_FLAG_ACT_DIRECT: u32 = 1;
const ETH_P_ALL: u16 = 3;

/// The program on the way from a pod, and the one on the way to it.
const HOOKS: [(&str, u32); 2] = [("from_pod", TC_H_INGRESS), ("to_pod", TC_H_EGRESS)];

/// The agent's pins, open.
pub struct Pins {
    programs: [OwnedFd; 2],
    /// `rn_endpoints`.
    pub endpoints: Endpoints,
}

impl Pins {
    /// Opens everything that ADD needs; an error names what is missing and the remedy.
    pub fn open(bpffs: &Path) -> Result<Self, Error> {
        let program = |name: &str| obj_get(&bpffs.join(names::PROGS_DIR).join(name));
        Ok(Self { programs: [program(HOOKS[0].0)?, program(HOOKS[1].0)?], endpoints: Endpoints::open(bpffs)? })
    }

    /// The messages that put the programs on a veth: the qdisc, then both filters. The agent may
    /// have been there first, for it repairs what it finds in the records.
    pub fn attach(&self, index: u32) -> Vec<Message> {
        let clsact = tcmsg(index, CLSACT_HANDLE, TC_H_CLSACT, 0);
        let mut out = vec![
            Message::new("add qdisc clsact", libc::RTM_NEWQDISC, NLM_F_CREATE | NLM_F_EXCL, &clsact)
                .text(TCA_KIND, "clsact")
                .tolerate(&[libc::EEXIST]),
        ];
        for ((name, parent), fd) in HOOKS.iter().zip(&self.programs) {
            let info = u32::from(names::TC_PRIORITY) << 16 | u32::from(ETH_P_ALL.to_be());
            let header = tcmsg(index, names::TC_HANDLE, *parent, info);
            let m = Message::new(format!("attach {name}"), libc::RTM_NEWTFILTER, NLM_F_CREATE, &header);
            let m = m.text(TCA_KIND, "bpf");
            out.push(m.nested(TCA_OPTIONS, |m| {
                m.u32(TCA_BPF_FD, fd.as_raw_fd().cast_unsigned())
                    .text(TCA_BPF_NAME, name)
                    .u32(TCA_BPF_FLAGS, TCA_BPF_FLAG_ACT_DIRECT)
            }));
        }
        out
    }
}

/// The hooks of a veth on which our filter is missing.
pub fn missing_filters(socket: &mut Socket, index: u32) -> Result<Vec<&'static str>, Refused> {
    let mut missing = Vec::new();
    for (name, parent) in HOOKS {
        let header = tcmsg(index, 0, parent, 0);
        let dump = Message::new("list filters", libc::RTM_GETTFILTER, NLM_F_DUMP, &header);
        let found = socket.run(vec![dump])?.iter().any(|r| {
            let Ok(header) = TcHeader::parse(&r.body) else { return false };
            let attrs = r.attrs(header.buffer_len());
            r.kind == libc::RTM_NEWTFILTER
                && header.handle == names::TC_HANDLE.into()
                && header.info >> 16 == u32::from(names::TC_PRIORITY)
                && attrs.text(TCA_KIND) == Some("bpf")
                && attrs.nested(TCA_OPTIONS).u32(TCA_BPF_FLAGS).is_some_and(|f| f & TCA_BPF_FLAG_ACT_DIRECT != 0)
        });
        if !found {
            missing.push(name);
        }
    }
    Ok(missing)
}

/// `struct tcmsg`.
pub fn tcmsg(index: u32, handle: u32, parent: u32, info: u32) -> TcHeader {
    TcHeader { index: index.cast_signed(), handle: handle.into(), parent: parent.into(), info, ..TcHeader::default() }
}
