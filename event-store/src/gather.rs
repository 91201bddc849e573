//! Group commit: appends that wait while one commit runs are committed together by the next.
//!
//! The log's row lock is then taken once a commit and not once a command, and the disk is flushed as
//! often.

use std::sync::Arc;

use sqlx::PgPool;
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use crate::append::Command;
use crate::commit::{Answer, Batch, Session};
use crate::recent::Recent;
use crate::seen::Seen;
use crate::{Once, StoreConfig};

/// An append that waits for its commit.
#[derive(Debug)]
pub(crate) struct Queued {
    pub command: Command,
    pub bytes: usize,
    pub reply: oneshot::Sender<Answer>,
    /// Its share of the queue's bytes, given back when it is answered.
    pub room: OwnedSemaphorePermit,
}

/// Takes what waits, up to the bounds, and has it committed.
#[derive(Debug)]
pub(crate) struct Gatherer {
    config: StoreConfig,
    waiting: mpsc::Receiver<Queued>,
    /// Taken from the queue, but too large for the batch before.
    left_over: Option<Queued>,
    session: Session,
    seen: Seen,
    stop: CancellationToken,
}

impl Gatherer {
    pub(crate) fn new(
        pool: PgPool,
        config: StoreConfig,
        waiting: mpsc::Receiver<Queued>,
        seen: Seen,
        recent: Arc<Recent>,
        stop: CancellationToken,
    ) -> Self {
        let session = Session::new(pool, config.clone(), seen.clone(), recent);
        Self { config, waiting, left_over: None, session, seen, stop }
    }

    /// Runs until it is stopped and the queue is empty, or every handle is dropped.
    pub(crate) async fn run(mut self) {
        while let Some(first) = self.first().await {
            let (batch, replies) = self.gather(first);
            if batch.is_empty() {
                continue;
            }
            let answers = self.session.commit(batch).await;
            let newest = answers.iter().flatten().filter_map(|once| match once {
                Once::Appended(appended) => Some(appended.last_position()),
                Once::Repeated(_) => None,
            });
            if let Some(newest) = newest.max() {
                self.seen.raise(newest);
            }
            for (Reply { reply, room }, answer) in replies.into_iter().zip(answers) {
                drop(room);
                // A caller who has gone needs no answer.
                let _ = reply.send(answer);
            }
        }
    }

    async fn first(&mut self) -> Option<Queued> {
        if let Some(queued) = self.left_over.take() {
            return Some(queued);
        }
        tokio::select! {
            biased;
            // A closed queue still hands out what it holds.
            () = self.stop.cancelled(), if !self.waiting.is_closed() => {
                self.waiting.close();
                self.waiting.recv().await
            }
            queued = self.waiting.recv() => queued,
        }
    }

    /// `first` and what waits behind it, in order, as far as the bounds allow.
    fn gather(&mut self, first: Queued) -> (Batch, Vec<Reply>) {
        let mut batch = Batch::new();
        let mut replies = Vec::new();
        let mut bytes = 0;
        let mut next = Some(first);
        while let Some(queued) = next {
            let events = batch.event_count() + queued.command.append.events.len();
            let full = batch.command_count() == self.config.gather_commands_max
                || events > self.config.gather_events_max
                || bytes + queued.bytes > self.config.gather_bytes_max;
            if full && !batch.is_empty() {
                self.left_over = Some(queued);
                break;
            }
            // Nobody waits for it any more, and it was never sent.
            if !queued.reply.is_closed() {
                bytes += queued.bytes;
                batch.push(Arc::new(queued.command));
                replies.push(Reply { reply: queued.reply, room: queued.room });
            }
            next = self.waiting.try_recv().ok();
        }
        (batch, replies)
    }
}

struct Reply {
    reply: oneshot::Sender<Answer>,
    room: OwnedSemaphorePermit,
}
