//! Answers on HTTP/2 whose streams must be read.
//!
//! A stream has a window of its own: a client that never widens it holds an answer for as long as the
//! connection lives, and the connection may be lively for ever. Nobody but the server's own buffers knows
//! what was taken, so every piece of an answer is followed until they let go of it.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::{Buf, Bytes};
use hyper::body::{Body, Frame, SizeHint};

/// What one connection's client has been given and has not taken, by the round that it was given in.
#[derive(Debug)]
pub struct Stalls {
    round: AtomicU64,
    counts: [AtomicUsize; ROUNDS],
}

const ROUNDS: usize = 3;

impl Default for Stalls {
    /// There is always a round before.
    fn default() -> Self {
        Self { round: AtomicU64::new(1), counts: Default::default() }
    }
}

impl Stalls {
    /// Ends when something was given and not taken for `stall_max`, at the latest after twice that.
    pub async fn met(&self, stall_max: Duration) {
        let mut rounds = tokio::time::interval(stall_max);
        rounds.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        // The first comes at once.
        rounds.tick().await;
        loop {
            rounds.tick().await;
            let round = self.round.load(Ordering::Acquire);
            // What was given in the round before this one is at least a whole round old.
            if 0 < self.count(round - 1).load(Ordering::Acquire) {
                return;
            }
            self.round.store(round + 1, Ordering::Release);
        }
    }

    fn count(&self, round: u64) -> &AtomicUsize {
        &self.counts[(round % ROUNDS as u64) as usize]
    }
}

/// Something that was given, until it is taken.
#[derive(Debug)]
struct Given {
    stalls: Arc<Stalls>,
    round: u64,
}

impl Given {
    fn now(stalls: &Arc<Stalls>) -> Self {
        let round = stalls.round.load(Ordering::Acquire);
        stalls.count(round).fetch_add(1, Ordering::AcqRel);
        Self { stalls: Arc::clone(stalls), round }
    }
}

impl Drop for Given {
    fn drop(&mut self) {
        self.stalls.count(self.round).fetch_sub(1, Ordering::AcqRel);
    }
}

/// An answer's body, followed on HTTP/2.
#[derive(Debug)]
pub struct Followed<B> {
    inner: B,
    stalls: Option<Arc<Stalls>>,
    /// From when more could be sent until more is asked for: only a client keeps that from happening.
    unasked: Option<Given>,
}

impl<B> Followed<B> {
    /// Followed when there are `stalls`.
    pub fn new(inner: B, stalls: Option<Arc<Stalls>>) -> Self {
        let unasked = stalls.as_ref().map(Given::now);
        Self { inner, stalls, unasked }
    }
}

impl<B: Body + Unpin> Body for Followed<B> {
    type Data = Piece<B::Data>;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, B::Error>>> {
        let this = &mut *self;
        this.unasked = None;
        let polled = Pin::new(&mut this.inner).poll_frame(context);
        let stalls = &this.stalls;
        polled.map(|next| {
            let follow = |data| Piece { data, given: stalls.as_ref().map(Given::now) };
            next.map(|frame| {
                this.unasked = stalls.as_ref().map(Given::now);
                frame.map(|frame| frame.map_data(follow))
            })
        })
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

/// A piece of an answer.
#[derive(Debug)]
pub struct Piece<D> {
    data: D,
    given: Option<Given>,
}

impl<D: Buf> Buf for Piece<D> {
    fn remaining(&self) -> usize {
        self.data.remaining()
    }

    fn chunk(&self) -> &[u8] {
        self.data.chunk()
    }

    fn chunks_vectored<'a>(&'a self, slices: &mut [std::io::IoSlice<'a>]) -> usize {
        self.data.chunks_vectored(slices)
    }

    fn copy_to_bytes(&mut self, bytes: usize) -> Bytes {
        self.data.copy_to_bytes(bytes)
    }

    fn advance(&mut self, bytes: usize) {
        self.data.advance(bytes);
        // Some of it was taken, so that the rest has its time again.
        if let Some(given) = &mut self.given {
            let again = Given::now(&given.stalls);
            *given = again;
        }
    }
}
