//! One unbroken stretch of publishing: from comparing log and stream to the first surprise.

use std::error::Error;
use std::sync::atomic::Ordering;

use async_nats::Client;
use async_nats::client::{PublishError, PublishErrorKind};
use async_nats::connection::State;
use async_nats::jetstream::context::{Context, ContextBuilder};
use async_nats::jetstream::stream::Stream;
use consistency::{Epoch, EpochHistory, Event, EventId, LogPosition, Position};
use futures::StreamExt;
use futures::future::try_join_all;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;

use super::pipeline::Pipeline;
use super::stream::{self, Comparison, Incarnation};
use super::{RelayState, Report};
use crate::recent::Follower;
use crate::refusal::{Refusal, RefusalKind};
use crate::{EventStore, Head, ReadError, RelayConfig};

/// How many messages of the stream are looked up at a time.
const LOOK_UP_COUNT_MAX: usize = 64;

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum SessionError {
    #[error("not connected to NATS")]
    Disconnected,
    #[error("could not read the log")]
    Read(#[from] ReadError),
    #[error("the stream could not be read, created, subscribed to or published to")]
    Stream(#[source] Box<dyn Error + Send + Sync>),
    /// It was committed before the server's bound was lowered.
    #[error("an event of the log is larger than the server publishes, raise its max_payload")]
    TooLarge(#[source] PublishError),
    /// Not an error: another relay published, an acknowledgement was lost, the connection was renewed.
    #[error("{0}")]
    LostPlace(&'static str),
    #[error("{0}")]
    Refused(String),
}

impl SessionError {
    pub(super) fn stream(error: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self::Stream(error.into())
    }

    pub(super) fn publish(error: PublishError) -> Self {
        match error.kind() {
            PublishErrorKind::MaxPayloadExceeded => Self::TooLarge(error),
            PublishErrorKind::Send | PublishErrorKind::InvalidSubject => Self::stream(error),
        }
    }
}

/// Events to be published, and where they were.
enum Found {
    /// Kept by this process.
    Recent(Vec<Event>),
    /// In the log.
    Read(Vec<Event>),
}

pub(super) struct Session<'a> {
    store: &'a EventStore,
    client: &'a Client,
    context: Context,
    config: &'a RelayConfig,
    report: &'a Report,
    shutdown: &'a CancellationToken,
    /// How often the client had connected when the session began.
    connect_count: u64,
}

impl<'a> Session<'a> {
    pub(super) fn new(
        store: &'a EventStore,
        client: &'a Client,
        config: &'a RelayConfig,
        report: &'a Report,
        shutdown: &'a CancellationToken,
    ) -> Self {
        let context = ContextBuilder::new().timeout(config.ack_wait_max).build(client.clone());
        let connect_count = client.statistics().connects.load(Ordering::Relaxed);
        Self { store, client, context, config, report, shutdown, connect_count }
    }

    /// Publishes until the shutdown (`Ok`) or a surprise.
    pub(super) async fn run(&self) -> Result<(), SessionError> {
        self.check_connection()?;
        self.note_payload_limit();
        let subject = self.config.wake_subject.clone();
        let wake = timeout(self.config.ack_wait_max, self.client.subscribe(subject)).await;
        let mut wake = wake.map_err(SessionError::stream)?.map_err(SessionError::stream)?;
        let mut head = self.store.watch_head();
        let (stream, end, end_id) = self.find_place().await?;
        self.report.published(end);
        self.report.state(RelayState::Active);
        let mut pipeline = Pipeline::new(self.client, self.config, end, end_id).await?;
        let recent = self.store.follow();
        let mut poll = interval(self.config.poll_interval);
        poll.set_missed_tick_behavior(MissedTickBehavior::Delay);
        poll.reset();
        let mut has_others = true;
        loop {
            head.mark_unchanged();
            // What was read before its commit was heard of needs no second look.
            if has_others || pipeline.acknowledged() < self.store.head_seen() {
                self.publish_backlog(&mut pipeline, &recent, has_others).await?;
            }
            has_others = tokio::select! {
                biased;
                // Nothing is in flight here.
                () = self.shutdown.cancelled() => return Ok(()),
                // What this process appended; the store outlives the session.
                _ = head.changed() => false,
                // What another process appended. An ended subscription is a lost connection.
                message = wake.next() => {
                    if message.is_none() {
                        return Err(SessionError::Disconnected);
                    }
                    true
                }
                // Whatever went unnoticed, an epoch that another process opened among it.
                _ = poll.tick() => {
                    check_log(&self.store.head().await?, &pipeline)?;
                    self.check_stream(&stream, pipeline.acknowledged()).await?;
                    true
                }
            };
            self.check_connection()?;
            self.check_epoch(end.epoch)?;
        }
    }

    /// Publishes until the stream is level with what is known of the log, or the shutdown. Nothing is in
    /// flight afterwards. `has_others` says that there may be events of other processes: then what is kept
    /// of our own is not all.
    async fn publish_backlog(
        &self,
        pipeline: &mut Pipeline<'_>,
        recent: &Follower,
        mut has_others: bool,
    ) -> Result<(), SessionError> {
        let mut events = self.next_after(pipeline.acknowledged().position, recent).await?;
        loop {
            let (Found::Recent(found) | Found::Read(found)) = &events;
            let Some(last) = found.last().map(|event| event.at.position) else { break };
            let is_cut = match &events {
                Found::Recent(found) => found.len() >= self.config.read_events_max,
                Found::Read(found) => self.store.may_have_cut(found, self.read_events_max()),
            };
            has_others &= matches!(events, Found::Recent(_));
            // Otherwise this was all, and whoever appends more says so.
            let is_more = is_cut || has_others || last < self.store.head_seen().position;
            // The next rows are read while these are sent.
            let next = async {
                if is_more { self.next_after(last, recent).await } else { Ok(Found::Read(vec![])) }
            };
            let (Found::Recent(found) | Found::Read(found)) = events;
            let (sent, next) = tokio::join!(pipeline.send(found), next);
            sent?;
            events = next?;
            self.report.published(pipeline.acknowledged());
            if self.shutdown.is_cancelled() {
                break;
            }
            self.check_connection()?;
        }
        pipeline.drain().await?;
        self.report.published(pipeline.acknowledged());
        Ok(())
    }

    /// What this process has just committed is at hand; all else is read.
    async fn next_after(
        &self,
        position: Position,
        recent: &Follower,
    ) -> Result<Found, SessionError> {
        match recent.take_after(position, self.config.read_events_max.max(1)) {
            Some(events) => Ok(Found::Recent(events)),
            None => Ok(Found::Read(self.read_after(position).await?)),
        }
    }

    async fn read_after(&self, position: Position) -> Result<Vec<Event>, SessionError> {
        Ok(self.store.read_range(position, self.read_events_max()).await?)
    }

    fn read_events_max(&self) -> u32 {
        u32::try_from(self.config.read_events_max.max(1)).unwrap_or(u32::MAX)
    }

    /// Compares stream and log; what they contradict each other in is told to the log.
    async fn find_place(&self) -> Result<(Stream, LogPosition, EventId), SessionError> {
        if let Some(reason) = self.store.head().await?.refused_because {
            return Err(SessionError::Refused(reason));
        }
        let epochs = self.store.epochs().await?;
        let incarnation =
            Incarnation { epoch: epochs.current(), starts_after: epochs.current_starts_after() };
        let stream = self.ensure_stream(&epochs, incarnation).await?;
        // The stream first: the log only grows, so a stream that is ahead of it then was never behind.
        let end = stream::end(&stream).await?;
        let head = self.store.head().await?;
        let position = Position::new(end.sequence).unwrap_or(Position::MAX);
        let id_in_log = self.store.event_id_at(position).await?;
        match stream::compare(end, incarnation, head.at, id_in_log) {
            Comparison::Continue(at, id) => {
                self.check_newcomers(&stream, at).await?;
                Ok((stream, at, id))
            }
            Comparison::Contradiction(reason) => {
                Err(self.refuse(incarnation.epoch, reason).await?)
            }
        }
    }

    /// The epoch's stream, with the configured retention. It is created after those of earlier epochs
    /// were retired.
    async fn ensure_stream(
        &self,
        epochs: &EpochHistory,
        incarnation: Incarnation,
    ) -> Result<Stream, SessionError> {
        if let Some(found) = stream::find(&self.context, incarnation.epoch).await? {
            stream::adopt_retention(&self.context, &found, incarnation, self.config).await?;
            return Ok(found);
        }
        let earlier = (1..incarnation.epoch.get()).filter_map(Epoch::new);
        for epoch in earlier {
            if let Some(found) = stream::find(&self.context, epoch).await? {
                self.check_kept(&found, epoch, epochs).await?;
                stream::retire(&self.context, &found).await?;
            }
        }
        stream::create(&self.context, incarnation, self.config).await
    }

    /// What later epochs kept of an earlier one must be what its stream told every region. Otherwise they
    /// begin too late, and the regions would keep events that the log lost.
    async fn check_kept(
        &self,
        stream: &Stream,
        epoch: Epoch,
        epochs: &EpochHistory,
    ) -> Result<(), SessionError> {
        let later = epochs.starts().iter().filter(|(later, _)| epoch < *later);
        let kept = later.map(|(_, start)| start.get()).min().unwrap_or_default();
        let sequence = stream::end(stream).await?.sequence.min(kept);
        let position = Position::new(sequence).unwrap_or_default();
        if position == Position::ZERO {
            return Ok(());
        }
        let in_log = self.store.event_id_at(position).await?;
        // What has aged out was compared when it was published.
        let on_stream = stream::id_at(stream, sequence).await?;
        if let (Some(on_stream), Some(in_log)) = (on_stream, in_log)
            && on_stream != in_log
        {
            let Refusal { because, .. } = stream::different(epoch, sequence, on_stream, in_log);
            let because = format!("{because}, so epoch {} begins too late", epochs.current());
            let refusal = Refusal { kind: RefusalKind::EpochTooLate, because };
            return Err(self.refuse(epochs.current(), refusal).await?);
        }
        Ok(())
    }

    /// Compares what came to the stream since it was last known. The last message is not enough: a
    /// stray one takes the place of one in flight, which is refused, and the next one fits again.
    async fn check_newcomers(&self, stream: &Stream, end: LogPosition) -> Result<(), SessionError> {
        let known = self.report.last_published().filter(|known| known.epoch == end.epoch);
        let Some(known) = known else { return Ok(()) };
        let span_max = (self.config.in_flight_max + 2 * self.config.read_events_max) as u64;
        let oldest = Position::new(end.position.get().saturating_sub(span_max));
        let mut after = known.position.max(oldest.unwrap_or_default());
        while after < end.position {
            let mut events = self.read_after(after).await?;
            events.retain(|event| event.at.position <= end.position);
            let Some(last) = events.last() else { return Ok(()) };
            after = last.at.position;
            for events in events.chunks(LOOK_UP_COUNT_MAX) {
                let sequences = events.iter().map(|event| event.at.position.get());
                let ids = sequences.map(|sequence| stream::id_at(stream, sequence));
                for (event, on_stream) in events.iter().zip(try_join_all(ids).await?) {
                    // What has aged out was compared when it was published.
                    if let Some(on_stream) = on_stream.filter(|on_stream| *on_stream != event.id) {
                        let sequence = event.at.position.get();
                        let reason = stream::different(end.epoch, sequence, on_stream, event.id);
                        return Err(self.refuse(end.epoch, reason).await?);
                    }
                }
            }
        }
        Ok(())
    }

    async fn refuse(&self, epoch: Epoch, refusal: Refusal) -> Result<SessionError, SessionError> {
        self.store.refuse(epoch, &refusal).await?;
        Ok(SessionError::Refused(refusal.because))
    }

    /// The stream still ends where this relay left it.
    async fn check_stream(&self, stream: &Stream, at: LogPosition) -> Result<(), SessionError> {
        let info = stream.get_info().await.map_err(SessionError::stream)?;
        if info.state.last_sequence == at.position.get() {
            Ok(())
        } else {
            Err(SessionError::LostPlace("the stream does not end where it did"))
        }
    }

    /// A new epoch has a stream of its own, which is there before there is anything to publish to it.
    fn check_epoch(&self, epoch: Epoch) -> Result<(), SessionError> {
        if self.store.head_seen().epoch == epoch {
            Ok(())
        } else {
            Err(SessionError::LostPlace("the log is in another epoch"))
        }
    }

    /// After a reconnect the server may be another one, with another stream.
    fn check_connection(&self) -> Result<(), SessionError> {
        if self.client.connection_state() != State::Connected {
            Err(SessionError::Disconnected)
        } else if self.client.statistics().connects.load(Ordering::Relaxed) != self.connect_count {
            Err(SessionError::LostPlace("the connection to NATS was renewed"))
        } else {
            Ok(())
        }
    }

    /// The store takes no event that this server would not (see [`EventStore::payload_bytes_max`]); that
    /// it is less than it was configured for is worth a word.
    fn note_payload_limit(&self) {
        let (server, configured) =
            (self.client.max_payload(), self.store.config().payload_bytes_max);
        if server < configured {
            tracing::warn!(server, configured, "the server's max_payload bounds what is appended");
        }
    }
}

/// The log still has what was published, as far as its end tells. A restored one may be as long as it was.
fn check_log(head: &Head, pipeline: &Pipeline<'_>) -> Result<(), SessionError> {
    let (published, id) = pipeline.sent();
    let is_lost =
        head.at.position < published.position || (head.at == published && head.event_id != id);
    if is_lost { Err(SessionError::LostPlace("the log does not end where it did")) } else { Ok(()) }
}
