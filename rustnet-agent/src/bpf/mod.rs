//! The kernel's BPF objects: the embedded programs, their pins and hooks, and typed stores over the maps.
//! Nothing outside this room calls bpf(2).

pub mod attach;
pub mod cgroup;
pub mod convert;
pub mod copy;
pub mod fs;
pub mod layout;
pub mod load;
pub mod log;
pub mod migrate;
pub mod object;
pub mod pin;
pub mod probe;
pub mod store;
pub mod sys;
pub mod upgrade;
pub mod xdp;

/// Adds to an error of bpf(2) what a person can do about it.
pub fn remedy(error: &std::io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => {
            "no rights: the agent needs CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON (or CAP_SYS_ADMIN), see deploy/"
        }
        Some(libc::ENOSYS) => "this kernel has no bpf(2): it must be built with CONFIG_BPF_SYSCALL",
        Some(libc::ENOMEM) => "the kernel has no memory for it: choose smaller maps",
        Some(libc::EINVAL) => {
            "this kernel does not know the feature: Linux 6.1 is the oldest that rustnet is tried with"
        }
        Some(libc::ENOENT) => "it does not exist",
        _ => "see the kernel's message",
    }
}
