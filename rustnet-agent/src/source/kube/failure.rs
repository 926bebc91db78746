//! What a failed request means to people, and what they can do about it.

use super::chain;
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
    /// There is no answer.
    Unreachable,
    /// It has troubles of its own.
    Server,
}

impl Failure {
    /// Of any request.
    pub fn of(error: &Error) -> Self {
        match error {
            Error::Api(status) => Self::of_status(status),
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
            Self::Server => "answers with errors",
        }
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
