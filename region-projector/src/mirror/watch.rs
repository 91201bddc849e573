//! Looks at the region's stream again and again.

use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream::Context;
use consistency::{Epoch, Position};
use tokio::sync::watch;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use super::{Care, Mirror, MirrorError, Observation, care, info};
use crate::health::{Health, Part, chain_of};
use crate::status::{self, Status};
use crate::telemetry::Telemetry;

const WHO: &str = "stream watch";

/// The stream that the region reads.
pub enum Kept {
    /// The primary's own, which its relay makes.
    Origin {
        /// The region's server.
        context: Box<Context>,
        /// Its name.
        stream: String,
    },
    /// A mirror, which is made and kept going here.
    Mirror(Box<Mirror>),
}

/// What the watch needs.
pub struct StreamWatch {
    /// What is watched.
    pub kept: Kept,
    /// The epoch of the stream.
    pub epoch: Epoch,
    /// How often it looks.
    pub every: Duration,
    /// A mirror that is behind and has heard nothing for so long is stalled.
    pub silence_max: Duration,
    /// A stalled mirror is nudged this often at most.
    pub nudge_interval: Duration,
    /// Says whether the mirror is stalled.
    pub stalled: watch::Sender<bool>,
    /// Says where the stream begins.
    pub begins: watch::Sender<Position>,
    /// Where the log's head is kept.
    pub status: Status,
    /// Where what is wrong goes.
    pub health: Health,
    /// What is counted.
    pub telemetry: Arc<Telemetry>,
}

impl StreamWatch {
    /// Looks until it is stopped.
    pub async fn run(self, stop: CancellationToken) {
        let mut before = None;
        let mut nudged_at = None;
        loop {
            let looked = stop.run_until_cancelled(self.look(&mut before, &mut nudged_at)).await;
            match looked {
                Some(Ok(())) => self.health.well(Part::Stream, WHO),
                Some(Err(error)) => self.health.unwell(Part::Stream, WHO, chain_of(&error)),
                None => return,
            }
            if stop.run_until_cancelled(sleep(self.pause(before.as_ref()))).await.is_none() {
                return;
            }
        }
    }

    /// An origin that does not answer is asked more often: every look that is missed after the link
    /// has healed is time that readers wait.
    fn pause(&self, before: Option<&Observation>) -> Duration {
        let unanswered = before.is_some_and(|seen| seen.origin.is_none());
        if unanswered { self.every / 4 } else { self.every }
    }

    async fn look(
        &self,
        before: &mut Option<Observation>,
        nudged_at: &mut Option<Instant>,
    ) -> Result<(), MirrorError> {
        match &self.kept {
            Kept::Origin { context, stream } => {
                let info = info(context, stream).await?.ok_or(MirrorError::Absent)?;
                let head = Position::new(info.state.last_sequence).unwrap_or_default();
                self.status.raise_head(self.epoch, head);
                self.begins_at(Position::new(info.state.first_sequence), false, None);
                Ok(())
            }
            Kept::Mirror(mirror) => {
                let now = mirror.observe().await?;
                for head in [now.mirror, now.origin].into_iter().flatten() {
                    self.status.raise_head(self.epoch, head);
                }
                self.begins_at(now.first, true, now.silent);
                let care = care(before.as_ref(), &now, self.silence_max);
                *before = Some(now);
                self.take_care(mirror, care, nudged_at).await
            }
        }
    }

    fn begins_at(&self, first: Option<Position>, is_mirror: bool, silent: Option<Duration>) {
        let first = first.unwrap_or_default();
        self.status.see_stream(first, is_mirror, silent, status::now());
        self.begins.send_if_modified(|held| std::mem::replace(held, first) != first);
    }

    async fn take_care(
        &self,
        mirror: &Mirror,
        care: Care,
        nudged_at: &mut Option<Instant>,
    ) -> Result<(), MirrorError> {
        let stalled = match care {
            Care::None | Care::Create | Care::Wait => false,
            Care::Nudge { .. } => true,
        };
        self.stalled.send_if_modified(|held| std::mem::replace(held, stalled) != stalled);
        match care {
            Care::None => Ok(()),
            Care::Create => mirror.ensure().await,
            Care::Wait => Err(MirrorError::Absent),
            Care::Nudge { origin } => {
                // A nudge takes a few trips across the ocean to show.
                if nudged_at.is_none_or(|at| self.nudge_interval <= at.elapsed()) {
                    *nudged_at = Some(Instant::now());
                    tracing::warn!(%origin, "mirror is stalled, nudging it");
                    self.telemetry.nudged();
                    mirror.nudge().await?;
                }
                Err(MirrorError::Stalled { origin })
            }
        }
    }
}
