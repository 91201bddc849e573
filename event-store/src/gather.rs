//! Group commit: appends that wait while one commit runs are committed together by the next.
//!
//! The log's row lock is then taken once a commit and not once a command, and the disk is flushed as
//! often. One commit runs at a time. Whoever comes while none does leads the next one, beside the request and
//! on its thread: an append by itself is handed to nobody and back. What has come by its end is the committer's,
//! which has a thread of its own.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use sqlx::PgPool;
use tokio::runtime::Handle;
use tokio::sync::{Notify, OwnedSemaphorePermit, oneshot};
use tokio::task::yield_now;
use tokio_util::sync::CancellationToken;

use crate::append::Command;
use crate::commit::{Answer, Batch, Session};
use crate::recent::Recent;
use crate::seen::Seen;
use crate::{AppendError, Once, StoreConfig};

/// An append that waits for its commit.
#[derive(Debug)]
pub(crate) struct Queued {
    pub command: Command,
    pub bytes: usize,
    pub reply: Reply,
}

/// Where the answer goes.
#[derive(Debug)]
pub(crate) struct Reply {
    to: oneshot::Sender<Answer>,
    /// Where it is waited for.
    home: Handle,
    /// The append's share of the queue's bytes, given back when it is answered.
    room: OwnedSemaphorePermit,
}

/// Takes what waits, up to the bounds, and has it committed.
#[derive(Debug)]
pub(crate) struct Gatherer {
    config: StoreConfig,
    queue: Mutex<Queue>,
    /// Used by the one that leads.
    session: tokio::sync::Mutex<Session>,
    /// Tells the committer that the lead is its own now.
    handed_over: Notify,
    seen: Seen,
}

#[derive(Debug, Default)]
struct Queue {
    waiting: VecDeque<Queued>,
    /// Somebody leads, who looks at the queue again before that ends.
    is_led: bool,
    /// Several were committed together the last time, and are likely to be the next.
    is_crowded: bool,
    is_closed: bool,
}

/// The right to commit, which one has at a time. However it ends, what waits by then is the committer's.
#[derive(Debug)]
struct Lead {
    gatherer: Arc<Gatherer>,
}

impl Gatherer {
    pub(crate) fn new(pool: PgPool, config: StoreConfig, seen: Seen, recent: Arc<Recent>) -> Self {
        let session = Session::new(pool, config.clone(), seen.clone(), recent);
        Self {
            config,
            queue: Mutex::default(),
            session: tokio::sync::Mutex::new(session),
            handed_over: Notify::new(),
            seen,
        }
    }

    /// Has the append wait for the next commit, and leads that if nobody does.
    pub(crate) fn push(self: &Arc<Self>, queued: Queued) -> Result<(), AppendError> {
        let mut queue = self.queue();
        if queue.is_closed {
            return Err(AppendError::Stopping);
        }
        if queue.waiting.len() == self.config.queue_commands_max {
            return Err(AppendError::Overloaded);
        }
        queue.waiting.push_back(queued);
        let (lead, is_crowded) = (queue.lead(), queue.is_crowded);
        drop(queue);
        if lead && is_crowded {
            self.handed_over.notify_one();
        } else if lead {
            tokio::spawn(Lead::of(self).commit_one());
        }
        Ok(())
    }

    /// The committer: takes the lead whenever it is handed over. Once it is stopped, it takes no more appends,
    /// commits those that wait, and ends.
    pub(crate) fn run(self: Arc<Self>, stop: CancellationToken) -> impl Future<Output = ()> {
        // Made here: what is run may be dropped before it begins.
        let leading = Leading(self);
        async move { leading.run(stop).await }
    }

    /// Takes no more appends. True if nobody leads, so that the caller does.
    fn close(&self) -> bool {
        let mut queue = self.queue();
        queue.is_closed = true;
        queue.lead()
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What waits, in order, as far as the bounds of one commit allow. Empty only when nothing waits.
    fn gather(&self) -> (Batch, Vec<Reply>) {
        let mut batch = Batch::new();
        let mut replies = Vec::new();
        let mut bytes = 0;
        let mut queue = self.queue();
        while let Some(next) = queue.waiting.front() {
            let events = batch.event_count() + next.command.append.events.len();
            let is_full = batch.command_count() == self.config.gather_commands_max
                || events > self.config.gather_events_max
                || bytes + next.bytes > self.config.gather_bytes_max;
            if is_full && !batch.is_empty() {
                break;
            }
            let Some(queued) = queue.waiting.pop_front() else { break };
            // Nobody waits for it any more, and it was never sent.
            if !queued.reply.to.is_closed() {
                bytes += queued.bytes;
                batch.push(Arc::new(queued.command));
                replies.push(queued.reply);
            }
        }
        if !batch.is_empty() {
            queue.is_crowded = batch.command_count() > 1;
        }
        (batch, replies)
    }

    async fn commit(
        &self,
        session: &mut Session,
        (batch, replies): (Batch, Vec<Reply>),
    ) -> Option<Untold<'_>> {
        let answers = session.commit(batch).await;
        let newest = answers.iter().flatten().filter_map(|once| match once {
            Once::Appended(appended) => Some(appended.last_position()),
            Once::Repeated(_) => None,
        });
        let untold = newest.max().map(|newest| {
            self.seen.raise_untold(newest);
            Untold(&self.seen)
        });
        answer(replies.into_iter().zip(answers));
        untold
    }
}

/// Sends the answers. Those to another runtime go together: to wake each task over there by itself would take as many
/// system calls, and the runtime to sleep in between.
fn answer(answers: impl Iterator<Item = (Reply, Answer)>) {
    let here = Handle::current().id();
    let mut elsewhere: Vec<(Handle, Vec<(Reply, Answer)>)> = Vec::new();
    for (reply, answer) in answers {
        let home = reply.home.id();
        if home == here {
            reply.send(answer);
        } else if let Some((_, told)) = elsewhere.iter_mut().find(|(known, _)| known.id() == home) {
            told.push((reply, answer));
        } else {
            elsewhere.push((reply.home.clone(), vec![(reply, answer)]));
        }
    }
    for (home, told) in elsewhere {
        home.spawn(async { told.into_iter().for_each(|(reply, answer)| reply.send(answer)) });
    }
}

impl Reply {
    /// For who waits on this runtime.
    pub(crate) fn here(to: oneshot::Sender<Answer>, room: OwnedSemaphorePermit) -> Self {
        Self { to, home: Handle::current(), room }
    }

    fn send(self, answer: Answer) {
        drop(self.room);
        // A caller who has gone needs no answer.
        let _ = self.to.send(answer);
    }
}

/// Whoever waits for a newer end is told when this ends.
struct Untold<'a>(&'a Seen);

impl Drop for Untold<'_> {
    fn drop(&mut self) {
        self.0.tell();
    }
}

/// The committer. When it ends, however that comes, nobody would take over what waits from then on.
struct Leading(Arc<Gatherer>);

impl Leading {
    async fn run(&self, stop: CancellationToken) {
        let Self(gatherer) = self;
        let mut is_closed = false;
        loop {
            tokio::select! {
                biased;
                () = gatherer.handed_over.notified() => {}
                () = stop.cancelled(), if !is_closed => {
                    is_closed = true;
                    if !gatherer.close() {
                        // Whoever leads hands it over.
                        continue;
                    }
                }
            }
            Lead::of(gatherer).commit_all().await;
            if is_closed {
                return;
            }
        }
    }
}

impl Drop for Leading {
    fn drop(&mut self) {
        let mut queue = self.0.queue();
        queue.is_closed = true;
        let unanswered = std::mem::take(&mut queue.waiting);
        drop(queue);
        drop(unanswered);
        if let Ok(mut session) = self.0.session.try_lock() {
            session.release();
        }
    }
}

impl Queue {
    /// Takes the lead if nobody has it.
    fn lead(&mut self) -> bool {
        !std::mem::replace(&mut self.is_led, true)
    }
}

impl Lead {
    fn of(gatherer: &Arc<Gatherer>) -> Self {
        Self { gatherer: Arc::clone(gatherer) }
    }

    /// Commits what waits by now. What comes meanwhile is left to the committer, and so is all if there is no
    /// connection for this runtime.
    async fn commit_one(self) {
        let gatherer = Arc::clone(&self.gatherer);
        let mut session = gatherer.session.lock().await;
        if !session.is_at_home() {
            return;
        }
        let gathered = gatherer.gather();
        if gathered.0.is_empty() {
            return;
        }
        let untold = gatherer.commit(&mut session, gathered).await;
        drop((session, self));
        // Whose append it was is answered first: the relay would take its processor.
        yield_now().await;
        drop(untold);
    }

    /// Commits until nothing waits.
    async fn commit_all(self) {
        let mut session = self.gatherer.session.lock().await;
        loop {
            let gathered = self.gatherer.gather();
            if gathered.0.is_empty() {
                return;
            }
            drop(self.gatherer.commit(&mut session, gathered).await);
        }
    }
}

impl Drop for Lead {
    fn drop(&mut self) {
        let mut queue = self.gatherer.queue();
        if queue.waiting.is_empty() && !queue.is_closed {
            queue.is_led = false;
        } else {
            self.gatherer.handed_over.notify_one();
        }
    }
}
