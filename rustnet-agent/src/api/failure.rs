//! What a failed request means to people, and what they can do about it.

use super::chain;
use super::deadline::Late;
use kube::Error;
use kube::core::Status;
use kube::runtime::watcher;

/// Why the API server gives no answer, or not the one asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// It does not know who asks.
    Credentials,
    /// It knows, and refuses.
    Rights,
    /// It is not the one that the certificate authority vouches for.
    Trust,
    /// Connections lead nowhere.
    Unreachable,
    /// Somebody accepts connections, and gives no answer in time.
    Silent,
    /// It has troubles of its own.
    Server,
}

impl Failure {
    /// All there are.
    pub const ALL: [Self; 6] =
        [Self::Credentials, Self::Rights, Self::Trust, Self::Unreachable, Self::Silent, Self::Server];

    /// Of any request.
    pub fn of(error: &Error) -> Self {
        match error {
            Error::Api(status) => Self::of_status(status),
            late if Late::is_cause_of(late) => Self::Silent,
            // The TLS library's words: its error is wrapped several times, by libraries that do not let it out.
            other if chain(other).contains("certificate") => Self::Trust,
            _ => Self::Unreachable,
        }
    }

    /// Of a watch.
    pub fn of_watch(error: &watcher::Error) -> Self {
        use watcher::Error as E;
        match error {
            E::InitialListFailed(error) | E::WatchStartFailed(error) | E::WatchFailed(error) => Self::of(error),
            E::WatchError(status) => Self::of_status(status),
            E::NoResourceVersion => Self::Server,
        }
    }

    fn of_status(status: &Status) -> Self {
        match status.code {
            401 => Self::Credentials,
            403 => Self::Rights,
            _ => Self::Server,
        }
    }

    /// The same for every request that fails so.
    pub fn words(self) -> &'static str {
        match self {
            Self::Credentials => "does not know this node's credentials (401)",
            Self::Rights => "refuses what the agent asks for (403)",
            Self::Trust => "is not trusted",
            Self::Unreachable => "cannot be reached",
            Self::Silent => "gives no answer in time",
            Self::Server => "answers with errors",
        }
    }

    /// Whether all nodes have it at the same time, and nobody but the server's people can help.
    pub fn is_outage(self) -> bool {
        matches!(self, Self::Unreachable | Self::Silent | Self::Server)
    }

    /// What people can do.
    pub fn remedy(self) -> &'static str {
        match self {
            Self::Credentials => {
                "renew the token or the client certificate where the kubeconfig or the service account has it, it is read again"
            }
            Self::Rights => "apply deploy/rbac.yaml, or bind its role to this account",
            Self::Trust => {
                "check that the address is the API server's, its certificate names it, and the authority is the cluster's"
            }
            Self::Unreachable => "check --api-server, firewalls, and whether the server runs",
            Self::Silent => {
                "see whether the API server hangs or is overloaded, or the load balancer before it has no server"
            }
            Self::Server => "see the API server's own log",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_are_distinguished() {
        let api = |code| {
            let mut status = Status::failure("x", "y");
            status.code = code;
            status
        };
        let io = |text: &str| Error::Service(Box::new(std::io::Error::other(text.to_owned())));
        for (error, want) in [
            (Error::Api(Box::new(api(401))), Failure::Credentials),
            (Error::Api(Box::new(api(403))), Failure::Rights),
            (Error::Api(Box::new(api(500))), Failure::Server),
            (io("invalid peer certificate: UnknownIssuer"), Failure::Trust),
            (io("Connection refused"), Failure::Unreachable),
        ] {
            assert_eq!(Failure::of(&error), want, "{error:?}");
            assert_eq!(Failure::of_watch(&watcher::Error::WatchStartFailed(error)), want);
        }
        assert_eq!(Failure::of_watch(&watcher::Error::WatchError(Box::new(api(401)))), Failure::Credentials);
        assert_eq!(Failure::of_watch(&watcher::Error::NoResourceVersion), Failure::Server);
    }
}
