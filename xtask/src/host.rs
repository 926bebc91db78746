//! What this machine is: the distribution, which decides package names, and what its kernel lacks.

use std::fs;

/// The families whose package names setup knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Distro {
    /// Debian and what calls itself like it.
    Debian,
    /// Ubuntu and what calls itself like it.
    Ubuntu,
    /// Something else, by the name it gives itself.
    Other(String),
}

impl Distro {
    /// This machine's.
    pub fn this() -> Self {
        let text = ["/etc/os-release", "/usr/lib/os-release"].iter().find_map(|f| fs::read_to_string(f).ok());
        Self::parse(&text.unwrap_or_default())
    }

    /// From the text of os-release(5).
    pub fn parse(os_release: &str) -> Self {
        let id = field(os_release, "ID").unwrap_or_default();
        let like = field(os_release, "ID_LIKE").unwrap_or_default();
        let is = |name: &str| id == name || like.split_whitespace().any(|l| l == name);
        // Ubuntu's children name both, Ubuntu itself names debian as its parent.
        if is("ubuntu") {
            Self::Ubuntu
        } else if is("debian") {
            Self::Debian
        } else {
            Self::Other(field(os_release, "PRETTY_NAME").unwrap_or_else(|| "an unknown distribution".to_owned()))
        }
    }
}

/// Whether the kernel has SCTP. It loads the module where there is one.
pub fn has_sctp() -> bool {
    // SAFETY: socket takes no pointers.
    let socket = unsafe { libc::socket(libc::AF_INET, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, libc::IPPROTO_SCTP) };
    if socket < 0 {
        return false;
    }
    // SAFETY: nobody else has this descriptor.
    unsafe { libc::close(socket) };
    true
}

/// One value; os-release values may stand in single or double quotes.
fn field(text: &str, name: &str) -> Option<String> {
    text.lines().find_map(|line| {
        let value = line.trim().strip_prefix(name)?.strip_prefix('=')?;
        Some(value.trim_matches(['"', '\'']).to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_are_distinguished() {
        assert_eq!(Distro::parse("PRETTY_NAME=\"Debian GNU/Linux 12 (bookworm)\"\nID=debian\n"), Distro::Debian);
        assert_eq!(Distro::parse("ID=ubuntu\nID_LIKE=debian\n"), Distro::Ubuntu);
        assert_eq!(Distro::parse("ID=linuxmint\nID_LIKE=\"ubuntu debian\"\n"), Distro::Ubuntu);
        assert_eq!(Distro::parse("ID=raspbian\nID_LIKE='debian'\n"), Distro::Debian);
        assert_eq!(Distro::parse("ID=fedora\nPRETTY_NAME=\"Fedora 44\"\n"), Distro::Other("Fedora 44".to_owned()));
        assert_eq!(Distro::parse(""), Distro::Other("an unknown distribution".to_owned()));
    }

    #[test]
    fn a_field_is_not_mistaken_for_a_longer_one() {
        assert_eq!(field("VERSION_ID=12\nID=debian", "ID"), Some("debian".to_owned()));
    }
}
