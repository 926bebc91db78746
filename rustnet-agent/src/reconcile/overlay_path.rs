//! Who writes and takes off the overlay's headers, and why. Pure.

use std::fmt;

use crate::config::OverlayPath;
use crate::net::ipsec::Ipsec;

/// Who does, on this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Choice {
    /// The programs, where they can.
    Programs,
    /// The device, because the setting says so.
    Device,
    /// The device, because packets of the programs pass no IPsec policies of the host. Never [`Ipsec::None`].
    DeviceForIpsec(Ipsec),
}

impl Choice {
    /// Chooses.
    pub fn new(setting: OverlayPath, ipsec: Ipsec) -> Self {
        match (setting, ipsec) {
            (OverlayPath::Device, _) => Self::Device,
            (OverlayPath::Programs, Ipsec::None) => Self::Programs,
            (OverlayPath::Programs, ipsec) => Self::DeviceForIpsec(ipsec),
        }
    }

    /// True if the programs write and take off the overlay's headers.
    pub fn is_programs(&self) -> bool {
        *self == Self::Programs
    }

    /// The same as a setting.
    pub fn path(&self) -> OverlayPath {
        if self.is_programs() { OverlayPath::Programs } else { OverlayPath::Device }
    }

    /// What is wrong where the programs do otherwise.
    pub fn mismatch(&self, used: OverlayPath) -> Option<String> {
        (used != self.path()).then(|| {
            format!(
                "{}, but it should be {self}; a running agent changes that at once, and its log says why if not; if none runs, start it",
                used.word()
            )
        })
    }

    /// What is wrong with the choice. A host that has policies is as it should be.
    pub fn problem(&self) -> Option<String> {
        let Self::DeviceForIpsec(Ipsec::Unknown(_)) = self else { return None };
        Some(format!(
            "overlay path: {self}; let the agent ask (CAP_NET_ADMIN in the host's network namespace), or give --overlay-path device"
        ))
    }
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Programs => f.write_str("programs"),
            Self::Device => f.write_str("device (--overlay-path device)"),
            Self::DeviceForIpsec(ipsec) => write!(f, "device ({ipsec})"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::ipsec::Policies;

    #[test]
    fn policies_and_what_is_not_known_lead_by_the_device() {
        let policies = Ipsec::Policies(Policies { incoming: 0, outgoing: 2, refuses_others: false });
        let refuses = Ipsec::Policies(Policies { refuses_others: true, ..Policies::default() });
        let unknown = Ipsec::Unknown("EPERM".to_owned());
        for (setting, ipsec, is_programs, has_problem, words) in [
            (OverlayPath::Programs, Ipsec::None, true, false, "programs"),
            (OverlayPath::Device, Ipsec::None, false, false, "device (--overlay-path device)"),
            (
                OverlayPath::Programs,
                policies.clone(),
                false,
                false,
                "device (IPsec policies on this host: 0 in, 2 out)",
            ),
            (OverlayPath::Device, policies, false, false, "device (--overlay-path device)"),
            (
                OverlayPath::Programs,
                refuses,
                false,
                false,
                "device (IPsec policies on this host: 0 in, 0 out, others refused)",
            ),
            (
                OverlayPath::Programs,
                unknown.clone(),
                false,
                true,
                "device (the kernel does not tell its IPsec policies: EPERM)",
            ),
            (OverlayPath::Device, unknown, false, false, "device (--overlay-path device)"),
        ] {
            let choice = Choice::new(setting, ipsec);
            assert_eq!((choice.is_programs(), choice.problem().is_some()), (is_programs, has_problem), "{choice:?}");
            assert_eq!(choice.to_string(), words);
            let other = OverlayPath::ALL.into_iter().find(|path| *path != choice.path()).unwrap();
            assert_eq!(choice.mismatch(choice.path()), None);
            let mismatch = choice.mismatch(other).unwrap();
            assert!(mismatch.starts_with(&format!("{}, but it should be {words}; ", other.word())), "{mismatch}");
        }
    }
}
