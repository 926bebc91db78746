//! Deadlines of requests: of the connection, of the head of an answer and of its body.
//!
//! TCP is no proof of a server: the kernel of a stopped process, or a load balancer whose server has vanished, accepts and
//! acknowledges for ever. A request that is late is dropped, and its connection with it, so that the next one takes a new
//! connection. A watch may rightly be silent. So the silence of a watch is no failure: its body ends, and the next watch, at
//! the same place, shows whether the server answers.

use super::backoff::spread;
use axum::body::{Bytes, HttpBody};
use axum::http::Request;
use http_body::Frame;
use std::error::Error;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::time::{Sleep, sleep};
use tower::BoxError;

/// How long each part of a request may take.
#[derive(Clone, Copy, Debug)]
pub struct Deadlines {
    /// TCP and TLS.
    pub connection: Duration,
    /// From the request to the head of the answer, connection and credentials included.
    pub head: Duration,
    /// From the head to the end of the body, of all answers but watches.
    pub body: Duration,
    /// A watch may be silent for this long, and up to a third more.
    pub silence: Duration,
}

impl Default for Deadlines {
    /// An API server itself gives up after a minute, and queues for 15 s at most. It sends a bookmark a minute on watches whose
    /// kind moves on.
    fn default() -> Self {
        Self {
            connection: Duration::from_secs(10),
            head: Duration::from_secs(30),
            body: Duration::from_mins(1),
            silence: Duration::from_secs(90),
        }
    }
}

/// Something did not come in time.
#[derive(Debug, thiserror::Error)]
#[error("no {what} within {limit:?}")]
pub(super) struct Late {
    what: &'static str,
    limit: Duration,
}

impl Late {
    /// Whether this is the cause of an error.
    pub(super) fn is_cause_of(error: &(dyn Error + 'static)) -> bool {
        error.is::<Self>() || error.source().is_some_and(Self::is_cause_of)
    }
}

/// Waits for something for some time.
///
/// # Errors
/// Its own, or [`Late`].
pub(super) async fn in_time<T, E: Into<BoxError>>(
    what: &'static str,
    limit: Duration,
    work: impl Future<Output = Result<T, E>>,
) -> Result<T, BoxError> {
    match tokio::time::timeout(limit, work).await {
        Ok(result) => result.map_err(Into::into),
        Err(_) => Err(Late { what, limit }.into()),
    }
}

/// Whether a request is for a watch, whose answer need not end.
pub(super) fn is_watch<B>(request: &Request<B>) -> bool {
    request.uri().query().is_some_and(|query| query.split('&').any(|pair| pair == "watch=true"))
}

/// A body that ends in time. `heard` is called for each of its parts.
pub(super) struct Timed<B, F> {
    inner: B,
    limit: Limit,
    timer: Option<Pin<Box<Sleep>>>,
    is_over: bool,
    heard: F,
}

enum Limit {
    /// Of the whole.
    Whole(Duration),
    /// Between two parts.
    Silence(Duration),
}

impl<B, F> Timed<B, F> {
    /// The body of an answer, whose head has just come.
    pub(super) fn new(inner: B, is_watch: bool, deadlines: &Deadlines, heard: F) -> Self {
        let (limit, timer) = if is_watch {
            // Spread, so that watches that began together do not go on together.
            (Limit::Silence(deadlines.silence + spread(deadlines.silence / 3)), None)
        } else {
            (Limit::Whole(deadlines.body), Some(Box::pin(sleep(deadlines.body))))
        };
        Self { inner, limit, timer, is_over: false, heard }
    }
}

impl<B, F> HttpBody for Timed<B, F>
where
    B: HttpBody<Data = Bytes, Error: Into<BoxError>> + Unpin,
    F: Fn() + Unpin,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = self.get_mut();
        if this.is_over {
            return Poll::Ready(None);
        }
        if let Poll::Ready(frame) = Pin::new(&mut this.inner).poll_frame(context) {
            if let Limit::Silence(_) = this.limit {
                this.timer = None;
            }
            if matches!(frame, Some(Ok(_))) {
                (this.heard)();
            }
            return Poll::Ready(frame.map(|frame| frame.map_err(Into::into)));
        }
        // Counted from here, as whoever reads may be slow itself.
        let (Limit::Whole(limit) | Limit::Silence(limit)) = this.limit;
        let timer = this.timer.get_or_insert_with(|| Box::pin(sleep(limit)));
        if timer.as_mut().poll(context).is_pending() {
            return Poll::Pending;
        }
        this.is_over = true;
        Poll::Ready(match this.limit {
            Limit::Whole(limit) => Some(Err(Late { what: "end of the answer", limit }.into())),
            Limit::Silence(limit) => {
                tracing::debug!(?limit, "a watch is silent, asking again");
                None
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::body::Body;
    use futures::{StreamExt as _, stream};
    use tokio::time::Instant;

    /// A body that sends this often, so many times, and then stays silent, open.
    fn body(every: Duration, times: usize) -> Body {
        let parts = stream::iter(0..times).then(move |_| async move {
            sleep(every).await;
            Ok::<_, std::convert::Infallible>(Bytes::from_static(b"x"))
        });
        Body::from_stream(parts.chain(stream::pending()))
    }

    /// Reads to the end: how many parts, how it ended, and when.
    async fn read(inner: Body, is_watch: bool) -> (usize, Result<(), BoxError>, Duration) {
        let start = Instant::now();
        let heard = std::cell::Cell::new(0);
        let note = || heard.set(heard.get() + 1);
        let mut timed = Timed::new(inner, is_watch, &Deadlines::default(), &note);
        let result = loop {
            match std::future::poll_fn(|context| Pin::new(&mut timed).poll_frame(context)).await {
                Some(Ok(_)) => {}
                Some(Err(error)) => break Err(error),
                None => break Ok(()),
            }
        };
        (heard.get(), result, start.elapsed())
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_that_does_not_end_is_late() {
        let Deadlines { body: limit, .. } = Deadlines::default();
        // Each part comes in time, and the whole does not.
        let (parts, result, took) = read(body(Duration::from_secs(7), 1000), false).await;
        assert_eq!((parts, took), (8, limit));
        let error = result.expect_err("late");
        assert!(Late::is_cause_of(&*error), "{error}");
        assert_eq!(error.to_string(), "no end of the answer within 60s");
    }

    #[tokio::test(start_paused = true)]
    async fn a_watch_ends_when_it_is_silent_and_not_before() {
        let Deadlines { silence, .. } = Deadlines::default();
        let (parts, result, took) = read(body(silence, 10), true).await;
        assert!(result.is_ok(), "silence is no failure");
        assert_eq!(parts, 10, "a watch may last");
        let (least, most) = (silence * 11, silence * 11 + silence / 3);
        assert!(took >= least && took <= most + Duration::from_millis(1), "{took:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_reader_is_no_silence() {
        let Deadlines { silence, .. } = Deadlines::default();
        let mut timed = Timed::new(body(Duration::from_secs(1), 2), true, &Deadlines::default(), || ());
        for _ in 0..2 {
            let frame = std::future::poll_fn(|context| Pin::new(&mut timed).poll_frame(context)).await;
            assert!(matches!(frame, Some(Ok(_))), "{frame:?}");
            sleep(silence * 2).await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_does_not_come_is_late() {
        let never = std::future::pending::<Result<(), BoxError>>();
        let error = in_time("answer", Duration::from_secs(30), never).await.expect_err("late");
        assert_eq!(error.to_string(), "no answer within 30s");
        let wrapped = kube::Error::Service(error);
        assert!(Late::is_cause_of(&wrapped));
        assert!(!Late::is_cause_of(&kube::Error::Service("refused".into())));
    }

    #[test]
    fn a_watch_is_recognised_by_its_query() {
        for (uri, want) in [
            ("/api/v1/nodes?&watch=true&timeoutSeconds=290", true),
            ("/api/v1/nodes?limit=250", false),
            ("/api/v1/nodes", false),
            ("/api/v1/pods?fieldSelector=metadata.name%3Dwatch=true", false),
        ] {
            assert_eq!(is_watch(&Request::get(uri).body(()).expect("a request")), want, "{uri}");
        }
    }
}
