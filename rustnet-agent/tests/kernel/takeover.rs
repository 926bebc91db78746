//! One agent writes at a time, and no other user can keep it from that.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use rustnet_agent::bpf::store::services;
use rustnet_agent::reconcile::presence::{self, is_served};

use crate::agent::{Agent, block_on, make_own_node, wait_until, web};
use crate::sandbox::{self, uplink};

#[test]
fn the_next_agent_writes_only_once_the_first_has_ended() {
    sandbox::run(|sandbox| {
        uplink();
        block_on(async {
            let count = || services(&sandbox.bpffs).unwrap().values().map(|entry| entry.count).max();
            let first = Agent::start_ready(sandbox.config(&[]), [make_own_node()].into_iter().chain(web(2))).await;
            let next = Agent::start(sandbox.config(&[]));
            next.send_all([make_own_node()].into_iter().chain(web(5))).await;
            let why = format!("another agent (pid {}", std::process::id());
            next.wait_unready(&[&why]).await;
            first.send(web(3)).await;
            wait_until("the first one goes on", || count() == Some(3)).await;
            assert!(next.health.liveness().is_ok());
            first.stop().await;
            next.ready().await;
            assert_eq!(count(), Some(5));
            next.stop().await;
            // One that only waits ends on a signal as well.
            let first = Agent::start(sandbox.config(&[]));
            wait_until("it serves", || is_served(&sandbox.run_dir)).await;
            let next = Agent::start(sandbox.config(&[]));
            next.wait_unready(&[&why]).await;
            next.stop().await;
            first.stop().await;
        });
    });
}

/// Makes this thread, and no other, another user's.
fn become_nobody() {
    const NOBODY: libc::uid_t = 65_534;
    for call in [libc::SYS_setresgid, libc::SYS_setresuid] {
        // SAFETY: both calls take three numbers and no pointer; unlike libc's functions they change this thread alone.
        let result = unsafe { libc::syscall(call, NOBODY, NOBODY, NOBODY) };
        assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    }
}

#[test]
fn no_other_user_keeps_the_agent_from_starting() {
    sandbox::run(|sandbox| {
        uplink();
        let open = |path: &Path, mode| std::fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
        std::fs::create_dir_all(&sandbox.run_dir).unwrap();
        open(&sandbox.dir, 0o755);
        open(&sandbox.run_dir, 0o755);
        // As earlier releases made it; whoever can read a file can lock it.
        let path = sandbox.run_dir.join(presence::LOCK);
        std::fs::write(&path, "").unwrap();
        open(&path, 0o644);
        let (locked, is_locked) = std::sync::mpsc::channel();
        let (end, is_over) = std::sync::mpsc::channel::<()>();
        let other = std::thread::spawn(move || {
            become_nobody();
            let file = std::fs::File::open(&path).unwrap();
            file.lock().unwrap();
            locked.send(()).unwrap();
            let _ = is_over.recv();
        });
        is_locked.recv().unwrap();
        block_on(async {
            let agent = Agent::start_ready(sandbox.config(&[]), [make_own_node()]).await;
            for name in [".", presence::LOCK, presence::WRITER_LOCK, presence::FILE, "node.json"] {
                let mode = std::fs::metadata(sandbox.run_dir.join(name)).unwrap().permissions().mode();
                assert_eq!(mode & 0o077, 0, "{name} is open to other users");
            }
            assert!(sandbox.rustnetctl("status").status.success(), "root's command still works");
            agent.stop().await;
        });
        drop(end);
        other.join().unwrap();
    });
}
