//! The processor architectures that the programs are built for.

/// One architecture.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum Arch {
    /// x86-64.
    Amd64,
    /// AArch64.
    Arm64,
}

impl Arch {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Amd64, Self::Arm64];

    /// That of this machine; none where rustnet is built for no such machine.
    pub fn host() -> Option<Self> {
        Self::ALL.into_iter().find(|arch| arch.rust() == std::env::consts::ARCH)
    }

    /// The name in image indexes, and of Debian and Go.
    pub fn name(self) -> &'static str {
        match self {
            Self::Amd64 => "amd64",
            Self::Arm64 => "arm64",
        }
    }

    /// The name of Rust and the kernel.
    pub fn rust(self) -> &'static str {
        match self {
            Self::Amd64 => "x86_64",
            Self::Arm64 => "aarch64",
        }
    }

    /// Rust's target.
    pub fn target(self) -> String {
        format!("{}-unknown-linux-gnu", self.rust())
    }

    /// The prefix of Debian's tools and directories.
    pub fn gnu(self) -> String {
        format!("{}-linux-gnu", self.rust())
    }
}
