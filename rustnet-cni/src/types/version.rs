//! The versions of the CNI specification that this binary speaks.

use super::error::{Error, code};
use std::fmt;

/// A version of the CNI specification; later ones compare greater.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Version {
    /// 0.3.0
    V030,
    /// 0.3.1
    V031,
    /// 0.4.0: CHECK
    V040,
    /// 1.0.0: no address family next to an address
    V100,
    /// 1.1.0: GC, STATUS, MTU in the result
    V110,
}

impl Version {
    /// All of them, oldest first.
    pub const ALL: [Self; 5] = [Self::V030, Self::V031, Self::V040, Self::V100, Self::V110];
    /// The newest.
    pub const LATEST: Self = Self::V110;

    /// The version as it stands in `cniVersion`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::V030 => "0.3.0",
            Self::V031 => "0.3.1",
            Self::V040 => "0.4.0",
            Self::V100 => "1.0.0",
            Self::V110 => "1.1.0",
        }
    }

    /// The version that a configuration asks for. A configuration without `cniVersion` means 0.1.0 (CNI specification).
    pub fn parse(text: Option<&str>) -> Result<Self, Error> {
        let text = text.unwrap_or("0.1.0");
        Self::ALL.into_iter().find(|v| v.as_str() == text).ok_or_else(|| {
            Error::new(code::VERSION, format!("the configuration's cniVersion {text:?} is not supported"))
                .details(format!("set cniVersion to one of {}", Self::list()))
        })
    }

    /// All versions in one line, for messages.
    pub fn list() -> String {
        Self::ALL.map(Self::as_str).join(", ")
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
