//! Bodies: whole, as nearly all of ours are, or streamed with a bound on their size and on their pauses.

use std::{
    fmt, mem,
    pin::Pin,
    sync::{Arc, OnceLock},
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt as _, combinators::UnsyncBoxBody};
use hyper::body::{Body as HttpBody, Frame, SizeHint};
use tokio::time::Sleep;

/// What an error of a body may be made of.
type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// The body of an answer, or of a request that is passed on.
pub enum Body {
    /// All of it is here.
    Whole(Bytes),
    /// It comes piece by piece.
    Stream(UnsyncBoxBody<Bytes, BodyError>),
}

/// Why a streamed body broke off.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    /// It has more bytes than may pass.
    #[error("the body has more than {bytes_max} bytes")]
    TooLarge {
        /// How many may.
        bytes_max: u64,
    },
    /// Nothing came for too long.
    #[error("the body stood still")]
    Stalled,
    /// Its sender broke it off.
    #[error("the body was broken off")]
    Broken(#[source] BoxError),
}

/// The same, for who only needs to know whose fault it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// More bytes than may pass.
    TooLarge {
        /// How many may.
        bytes_max: u64,
    },
    /// It stood still or was broken off.
    BrokenOff,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooLarge { bytes_max } => write!(f, "a body has at most {bytes_max} bytes"),
            Self::BrokenOff => f.write_str("the body broke off"),
        }
    }
}

impl From<&BodyError> for Fault {
    fn from(error: &BodyError) -> Self {
        match error {
            BodyError::TooLarge { bytes_max } => Self::TooLarge { bytes_max: *bytes_max },
            BodyError::Stalled | BodyError::Broken(_) => Self::BrokenOff,
        }
    }
}

impl Default for Body {
    fn default() -> Self {
        Self::empty()
    }
}

impl Body {
    /// Without a byte.
    pub const fn empty() -> Self {
        Self::Whole(Bytes::new())
    }

    /// Passes `body` on as it comes.
    pub fn stream<B>(body: B) -> Self
    where
        B: HttpBody<Data = Bytes, Error = BodyError> + Send + 'static,
    {
        Self::Stream(body.boxed_unsync())
    }

    /// Tells later whether and how the body broke off, which a client that sends it does not always.
    pub fn watch(&mut self) -> Arc<OnceLock<Fault>> {
        let fault = Arc::new(OnceLock::new());
        if let Self::Stream(body) = self {
            let body = mem::take(body);
            let noted = Arc::clone(&fault);
            let watched = body.map_err(move |error| {
                // The first is the one that broke it.
                let _ = noted.set(Fault::from(&error));
                error
            });
            *self = Self::Stream(watched.boxed_unsync());
        }
        fault
    }

    /// The bytes, when all of them are here.
    pub const fn whole(&self) -> Option<&Bytes> {
        match self {
            Self::Whole(bytes) => Some(bytes),
            Self::Stream(_) => None,
        }
    }
}

impl From<Bytes> for Body {
    fn from(bytes: Bytes) -> Self {
        Self::Whole(bytes)
    }
}

impl fmt::Debug for Body {
    /// What is in it is nobody's business.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Whole(bytes) => write!(f, "Whole({} bytes)", bytes.len()),
            Self::Stream(_) => f.write_str("Stream"),
        }
    }
}

impl HttpBody for Body {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match &mut *self {
            Self::Whole(bytes) if bytes.is_empty() => Poll::Ready(None),
            Self::Whole(bytes) => Poll::Ready(Some(Ok(Frame::data(mem::take(bytes))))),
            Self::Stream(body) => Pin::new(body).poll_frame(context),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Whole(bytes) => bytes.is_empty(),
            Self::Stream(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Whole(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Self::Stream(body) => body.size_hint(),
        }
    }
}

/// What a body may take.
#[derive(Debug, Clone, Copy)]
pub struct BodyBounds {
    /// Bytes of all of it.
    pub bytes_max: u64,
    /// Without a byte.
    pub pause_max: Duration,
}

/// A body within its bounds. It holds what its exchange has taken of a budget until it is over.
#[derive(Debug)]
pub struct Bounded<B, H> {
    inner: B,
    bounds: BodyBounds,
    passed: u64,
    pause: Option<Pin<Box<Sleep>>>,
    _held: H,
}

impl<B, H> Bounded<B, H> {
    /// `held` is let go with the body.
    pub const fn new(inner: B, bounds: BodyBounds, held: H) -> Self {
        Self { inner, bounds, passed: 0, pause: None, _held: held }
    }
}

impl<B, H> HttpBody for Bounded<B, H>
where
    B: HttpBody<Data = Bytes> + Unpin,
    B::Error: Into<BoxError>,
    H: Unpin,
{
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = self.get_mut();
        let Poll::Ready(next) = Pin::new(&mut this.inner).poll_frame(context) else {
            let pause_max = this.bounds.pause_max;
            let sleep = || Box::pin(tokio::time::sleep(pause_max));
            ready!(this.pause.get_or_insert_with(sleep).as_mut().poll(context));
            return Poll::Ready(Some(Err(BodyError::Stalled)));
        };
        this.pause = None;
        Poll::Ready(match next {
            None => None,
            Some(Err(error)) => Some(Err(BodyError::Broken(error.into()))),
            Some(Ok(frame)) => {
                this.passed += frame.data_ref().map_or(0, |data| data.len() as u64);
                let bytes_max = this.bounds.bytes_max;
                let fits = this.passed <= bytes_max;
                Some(if fits { Ok(frame) } else { Err(BodyError::TooLarge { bytes_max }) })
            }
        })
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use futures::stream;
    use http_body_util::StreamBody;

    use super::*;

    fn bounded(chunks: Vec<&'static str>, ends: bool) -> Body {
        let chunks = chunks.into_iter().map(|chunk| Ok(Frame::data(Bytes::from(chunk))));
        let chunks = stream::iter(chunks.collect::<Vec<Result<_, BoxError>>>());
        let rest = stream::poll_fn(move |_| if ends { Poll::Ready(None) } else { Poll::Pending });
        let body = StreamBody::new(futures::StreamExt::chain(chunks, rest));
        let bounds = BodyBounds { bytes_max: 8, pause_max: Duration::from_secs(5) };
        Body::stream(Bounded::new(body, bounds, ()))
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_passes_within_its_bounds_and_breaks_off_beyond_them() {
        let whole = bounded(vec!["four", "more"], true).collect().await.unwrap();
        assert_eq!(whole.to_bytes(), "fourmore");
        let large = bounded(vec!["four", "more", "!"], true).collect().await;
        assert!(matches!(large, Err(BodyError::TooLarge { bytes_max: 8 })), "{large:?}");
        let stalled = bounded(vec!["four"], false).collect().await;
        assert!(matches!(stalled, Err(BodyError::Stalled)), "{stalled:?}");
    }

    #[tokio::test]
    async fn a_whole_body_is_one_frame_of_known_size() {
        let body = Body::from(Bytes::from("tide"));
        assert_eq!(body.size_hint().exact(), Some(4));
        assert_eq!(body.collect().await.unwrap().to_bytes(), "tide");
        assert!(Body::empty().is_end_stream());
    }
}
