//! Network policies, as far as ADD has to wait for them. While there are policies, the programs drop what a pod sends and receives until
//! the agent has decided about it.

use crate::maps::{Map, OfPolicies, OfPolicyPods};
use crate::types::error::Error;
use rustnet_common::addr::Addr;
use rustnet_common::policy::flags;
use std::io;
use std::net::IpAddr;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

/// How long ADD waits for the agent. The runtime gives up much later.
const PATIENCE: Duration = Duration::from_secs(3);
/// Between two looks at the maps: the agent needs some milliseconds.
const PAUSE: Duration = Duration::from_millis(2);

/// Waits until the programs let through what a pod may send and receive, by its addresses and its interface.
///
/// Whatever keeps the agent from deciding is no reason to refuse the pod: it stays closed until the agent decides.
pub fn await_decision(bpffs: &Path, ips: &[IpAddr], ifindex: u32) {
    match Decision::open(bpffs).map(|decision| decision.wait(ips, ifindex)) {
        // Programs of an earlier release know no policies.
        Err(_) | Ok(Ok(true)) => {}
        Ok(Ok(false)) => eprintln!(
            "rustnet-cni: the agent has not applied network policies to the pod within {PATIENCE:?}: it has no network until then; \
             look at the agent's log"
        ),
        Ok(Err(e)) => eprintln!("rustnet-cni: cannot see whether network policies are applied to the pod: {e}"),
    }
}

/// The maps from which a decision is read.
struct Decision {
    policies: Map<OfPolicies>,
    pods: Map<OfPolicyPods>,
}

impl Decision {
    fn open(bpffs: &Path) -> Result<Self, Error> {
        Ok(Self { policies: Map::open(bpffs)?, pods: Map::open(bpffs)? })
    }

    /// False if the time is up.
    fn wait(&self, ips: &[IpAddr], ifindex: u32) -> io::Result<bool> {
        let began = Instant::now();
        while !self.is_there(ips, ifindex)? {
            if began.elapsed() >= PATIENCE {
                return Ok(false);
            }
            sleep(PAUSE);
        }
        Ok(true)
    }

    fn is_there(&self, ips: &[IpAddr], ifindex: u32) -> io::Result<bool> {
        if self.policies.get(0)?.is_none_or(|it| it.flags & flags::ENFORCED == 0) {
            return Ok(true);
        }
        for ip in ips {
            if self.pods.get(Addr::from(*ip))?.is_none_or(|pod| pod.ifindex != ifindex) {
                return Ok(false);
            }
        }
        Ok(true)
    }
}
