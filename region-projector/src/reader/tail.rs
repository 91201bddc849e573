//! The end of the region's stream, read once for all readers that have come there.
//!
//! A reader that is behind has a pull of its own. Once that has nothing to come, the reader follows the
//! tail instead: one pull, whose last messages are kept for a while for whoever follows. Nobody waits for
//! a follower. One that is too slow finds that what comes next for it is not kept any more, and has a pull
//! of its own again.
//!
//! Where a reader goes on it says itself, each time: at the end of its chain. Nobody's place is kept here,
//! so whatever becomes of the tail, its readers lose nothing and get nothing twice.

use std::collections::VecDeque;
use std::pin::pin;
use std::sync::Arc;

use consistency::Position;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use super::pull::{Bounds, Pull, PullError, Read, Stream};

/// Messages that are kept at most. Their bytes are bounded by what one request brings.
const KEPT_EVENTS_MAX: usize = 4096;
/// Readers that ask at the same time; more of them wait.
const ASKS_MAX: usize = 64;

/// The end of a stream, for its readers. Cheap to clone, shared by all clones.
#[derive(Clone)]
pub struct Tail {
    stream: Stream,
    asks: mpsc::Sender<Ask>,
}

/// Reads the end of a stream while anybody follows.
pub struct TailReader {
    stream: Stream,
    asks: mpsc::Receiver<Ask>,
}

/// A reader wants to read on.
struct Ask {
    after: Position,
    /// The pull that the reader has come there with.
    own: Option<Box<Pull>>,
    reply: oneshot::Sender<Result<Option<Source>, Arc<PullError>>>,
}

/// Where a reader has its messages from.
enum Source {
    /// It is behind.
    Own(Box<Pull>),
    /// It is at the end, like others.
    Shared(watch::Receiver<Kept>),
}

/// What one reader has of the stream.
pub struct Intake {
    tail: Tail,
    source: Option<Source>,
}

/// The end of a stream, of which one is to be run and the other is for the readers.
pub fn of(stream: Stream) -> (Tail, TailReader) {
    let (sender, asks) = mpsc::channel(ASKS_MAX);
    (Tail { stream: stream.clone(), asks: sender }, TailReader { stream, asks })
}

impl Tail {
    /// For one reader.
    pub fn intake(&self) -> Intake {
        Intake { tail: self.clone(), source: None }
    }

    async fn source(
        &self,
        after: Position,
        own: Option<Box<Pull>>,
    ) -> Result<Source, Arc<PullError>> {
        let over = || Arc::new(PullError::Over);
        let (reply, replied) = oneshot::channel();
        self.asks.send(Ask { after, own, reply }).await.map_err(|_| over())?;
        match replied.await.map_err(|_| over())?? {
            Some(source) => Ok(source),
            // Opened here, since nobody else is to wait for that.
            None => Ok(Source::Own(Box::new(Pull::open(&self.stream, after).await?))),
        }
    }
}

impl Intake {
    /// Waits until there is something after `after`, and takes what there is, at most one batch, in stream
    /// order. Nothing when the server has only said that it is there. What was taken before must be at or
    /// below `after`. Cancelling loses nothing.
    pub async fn next(&mut self, after: Position) -> Result<Vec<Read>, Arc<PullError>> {
        loop {
            let source = match self.source.take() {
                Some(Source::Own(pull)) if pull.is_at_end() => {
                    self.tail.source(after, Some(pull)).await?
                }
                Some(source) => source,
                None => self.tail.source(after, None).await?,
            };
            let read = match self.source.insert(source) {
                Source::Own(pull) => pull.next().await.map(Some).map_err(Arc::new),
                Source::Shared(kept) => followed(kept, after).await,
            };
            match read {
                Ok(Some(reads)) => return Ok(reads),
                Ok(None) => self.leave(),
                Err(error) => {
                    self.leave();
                    return Err(error);
                }
            }
            tracing::debug!(%after, "too far behind to follow the end of the stream");
        }
    }

    /// The last position of the stream, as far as the server has said.
    pub fn head(&self) -> Option<Position> {
        match self.source.as_ref()? {
            Source::Own(pull) => Some(pull.head()),
            Source::Shared(kept) => Some(kept.borrow().head),
        }
    }

    /// Reads no more for now, and begins anew with the next read.
    pub fn leave(&mut self) {
        self.source = None;
    }
}

/// What is kept after `after`; `None` when what comes next is not kept any more.
async fn followed(
    kept: &mut watch::Receiver<Kept>,
    after: Position,
) -> Result<Option<Vec<Read>>, Arc<PullError>> {
    let there = kept.borrow_and_update().after(after);
    if there.as_ref().is_none_or(|reads| !reads.is_empty()) {
        return Ok(there);
    }
    let changed = kept.changed().await;
    let kept = kept.borrow_and_update();
    match (kept.after(after), &kept.failed) {
        // All that came before it failed is good.
        (Some(reads), Some(error)) if reads.is_empty() => Err(Arc::clone(error)),
        (Some(reads), None) if reads.is_empty() && changed.is_err() => {
            Err(Arc::new(PullError::Over))
        }
        (there, _) => Ok(there),
    }
}

impl TailReader {
    /// Reads until it is stopped.
    pub async fn run(self, stop: CancellationToken) {
        stop.run_until_cancelled(self.serve()).await;
    }

    async fn serve(mut self) {
        while let Some(ask) = self.asks.recv().await {
            if let Some((pull, kept)) = self.begin(ask).await {
                self.lead(pull, kept).await;
            }
        }
    }

    /// Begins where a reader is, if that is the end. Otherwise the pull is the reader's own.
    async fn begin(&mut self, ask: Ask) -> Option<(Box<Pull>, watch::Sender<Kept>)> {
        let Ask { after, own, reply } = ask;
        if reply.is_closed() {
            return None;
        }
        let opened = match own {
            Some(pull) => Ok(pull),
            None => Pull::open(&self.stream, after).await.map(Box::new),
        };
        match opened {
            Ok(pull) if pull.is_at_end() => {
                let kept = Kept::new(after, self.stream.bounds);
                let (sender, receiver) = watch::channel(kept);
                // If the reader is gone by now, nobody follows, and that ends it.
                let _ = reply.send(Ok(Some(Source::Shared(receiver))));
                return Some((pull, sender));
            }
            Ok(pull) => {
                let _ = reply.send(Ok(Some(Source::Own(pull))));
            }
            Err(error) => self.refuse(reply, &Arc::new(error)),
        }
        None
    }

    /// Whoever asked meanwhile is told the same: else each would wait for the same failure in turn.
    fn refuse(
        &mut self,
        first: oneshot::Sender<Result<Option<Source>, Arc<PullError>>>,
        error: &Arc<PullError>,
    ) {
        let _ = first.send(Err(Arc::clone(error)));
        while let Ok(waiting) = self.asks.try_recv() {
            let _ = waiting.reply.send(Err(Arc::clone(error)));
        }
    }

    /// Keeps what comes for those who follow, until nobody does or nothing comes any more.
    async fn lead(&mut self, mut pull: Box<Pull>, kept: watch::Sender<Kept>) {
        loop {
            let read = {
                let mut reading = pin!(pull.next());
                loop {
                    tokio::select! {
                        biased;
                        // Whoever asks does not wait for the stream, and may be the last who follows.
                        Some(ask) = self.asks.recv() => answer(&kept, ask),
                        // A consumer that nobody needs is the server's to forget.
                        () = kept.closed() => return,
                        read = &mut reading => break read,
                    }
                }
            };
            let head = pull.head();
            let has_failed = read.is_err();
            kept.send_modify(|kept| match read {
                Ok(reads) => kept.push(reads, head),
                Err(error) => kept.failed = Some(Arc::new(error)),
            });
            if has_failed {
                return;
            }
        }
    }
}

/// Lets a reader follow from where it is, or keep the pull that it has.
fn answer(kept: &watch::Sender<Kept>, ask: Ask) {
    let is_kept = kept.borrow().after <= ask.after;
    let source =
        if is_kept { Some(Source::Shared(kept.subscribe())) } else { ask.own.map(Source::Own) };
    let _ = ask.reply.send(Ok(source));
}

/// The last messages of the stream.
struct Kept {
    /// All that came after this position is here.
    after: Position,
    reads: VecDeque<Read>,
    bytes: usize,
    bytes_max: usize,
    batch_max: usize,
    /// The last position of the stream, as far as the server has said.
    head: Position,
    /// Why nothing comes any more.
    failed: Option<Arc<PullError>>,
}

impl Kept {
    fn new(after: Position, bounds: Bounds) -> Self {
        Self {
            after,
            reads: VecDeque::new(),
            bytes: 0,
            bytes_max: bounds.bytes_max,
            batch_max: bounds.batch,
            head: after,
            failed: None,
        }
    }

    fn push(&mut self, reads: Vec<Read>, head: Position) {
        self.head = head;
        self.bytes += reads.iter().map(Read::bytes).sum::<usize>();
        self.reads.extend(reads);
        while self.is_too_much()
            && let Some(oldest) = self.reads.pop_front()
        {
            self.bytes -= oldest.bytes();
            self.after = oldest.position();
        }
    }

    /// The newest message is kept, however large it is.
    fn is_too_much(&self) -> bool {
        let count = self.reads.len();
        1 < count && (KEPT_EVENTS_MAX < count || self.bytes_max < self.bytes)
    }

    /// What came after `after`, at most one batch; `None` when not all of it is here.
    fn after(&self, after: Position) -> Option<Vec<Read>> {
        if after < self.after {
            return None;
        }
        let next = self.reads.partition_point(|read| read.position() <= after);
        Some(self.reads.range(next..).take(self.batch_max).cloned().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn position(value: u64) -> Position {
        Position::new(value).unwrap()
    }

    fn read(place: u64) -> Read {
        Read::Unreadable { position: position(place), reason: "x".repeat(100) }
    }

    fn kept_after(after: u64, bytes_max: usize) -> Kept {
        Kept::new(position(after), Bounds { batch: 10, bytes_max })
    }

    /// The positions that are kept after one, if all are.
    fn after(kept: &Kept, place: u64) -> Option<Vec<u64>> {
        let reads = kept.after(position(place))?;
        Some(reads.iter().map(|read| read.position().get()).collect())
    }

    #[test]
    fn what_is_kept_is_given_from_any_place_on_where_nothing_is_left_out() {
        let mut kept = kept_after(5, 1_000_000);
        assert_eq!(after(&kept, 5), Some(vec![]));
        assert_eq!(after(&kept, 4), None, "nobody knows what came between");
        assert_eq!(after(&kept, 9), Some(vec![]), "it is ahead");
        // A message was lost: that is the chain's to notice, not ours.
        kept.push(vec![read(6), read(8)], position(8));
        assert_eq!(after(&kept, 5), Some(vec![6, 8]));
        assert_eq!(after(&kept, 6), Some(vec![8]));
        assert_eq!(after(&kept, 7), Some(vec![8]));
        assert_eq!(after(&kept, 8), Some(vec![]));
        kept.push((9..50).map(read).collect(), position(49));
        assert_eq!(after(&kept, 8), Some((9..19).collect()), "one batch");
    }

    #[test]
    fn what_is_kept_is_bounded_and_who_is_below_is_told_so() {
        let each = read(1).bytes();
        let mut kept = kept_after(0, 3 * each);
        kept.push((1..=3).map(read).collect(), position(3));
        assert_eq!(after(&kept, 0), Some(vec![1, 2, 3]));
        kept.push(vec![read(4), read(5)], position(5));
        assert_eq!(after(&kept, 1), None);
        assert_eq!(after(&kept, 2), Some(vec![3, 4, 5]));
        assert_eq!(kept.bytes, 3 * each);
        let large = Read::Unreadable { position: position(6), reason: "x".repeat(10_000) };
        kept.push(vec![large], position(6));
        assert_eq!(after(&kept, 4), None);
        assert_eq!(after(&kept, 5), Some(vec![6]), "the newest, however large");

        let mut kept = kept_after(0, usize::MAX);
        let count = KEPT_EVENTS_MAX as u64;
        kept.push((1..=count + 1).map(read).collect(), position(count + 1));
        assert_eq!(kept.reads.len(), KEPT_EVENTS_MAX);
        assert_eq!((after(&kept, 0), kept.after), (None, position(1)));
    }

    #[tokio::test]
    async fn who_follows_gets_all_that_came_before_a_failure_and_then_the_failure() {
        let (sender, mut follower) = watch::channel(kept_after(0, 1_000_000));
        sender.send_modify(|kept| kept.push(vec![read(1), read(2)], position(2)));
        sender.send_modify(|kept| kept.failed = Some(Arc::new(PullError::Silent)));
        drop(sender);
        let reads = followed(&mut follower, position(0)).await.unwrap().unwrap();
        assert_eq!(reads.len(), 2);
        for _ in 0..2 {
            let failed = followed(&mut follower, position(2)).await;
            assert!(matches!(failed.unwrap_err().as_ref(), PullError::Silent));
        }
    }

    #[tokio::test]
    async fn who_follows_hears_that_the_server_is_there_and_when_nobody_reads_any_more() {
        let (sender, mut follower) = watch::channel(kept_after(0, 1_000_000));
        let said = async { sender.send_modify(|kept| kept.push(Vec::new(), position(0))) };
        let (heard, ()) = tokio::join!(followed(&mut follower, position(0)), said);
        assert!(heard.unwrap().unwrap().is_empty());
        drop(sender);
        let over = followed(&mut follower, position(0)).await;
        assert!(matches!(over.unwrap_err().as_ref(), PullError::Over));
    }
}
