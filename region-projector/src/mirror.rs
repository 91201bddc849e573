//! The region's copy of the primary's stream, and the watch over it.
//!
//! A mirror resumes by itself after a cut, but may take most of a minute: a server that asked for a new
//! consumer while the link was down waits 30 s for the answer, and longer after each failure. Its
//! own `lag` does not tell: it is frozen while nothing arrives. So the origin's head is asked for out
//! of band, and while a mirror stands still behind an origin that answers, the log is read over HTTP
//! instead, and the mirror is nudged by an update of its configuration that changes nothing. A
//! server that waits for its answer is not moved by that; the log bridges the wait.

pub mod watch;

use std::time::Duration;

use async_nats::jetstream::context::{GetStreamError, GetStreamErrorKind};
use async_nats::jetstream::stream::{Config, External, Info, Source, StorageType};
use async_nats::jetstream::{self, Context};
use consistency::Position;
use tokio::time::timeout;

/// The deadline of a request to a server's API, the origin's across the ocean included.
const REQUEST_MAX: Duration = Duration::from_secs(3);

/// Why the mirror cannot be kept.
#[derive(Debug, thiserror::Error)]
pub enum MirrorError {
    /// The stream's state could not be read.
    #[error("cannot read the stream's state")]
    Info(#[from] GetStreamError),
    /// The mirror could not be made.
    #[error("cannot create the mirror")]
    Create(#[from] jetstream::context::CreateStreamError),
    /// The mirror could not be nudged.
    #[error("cannot update the mirror")]
    Update(#[source] jetstream::context::UpdateStreamError),
    /// The server did not answer in time.
    #[error("the server did not answer in time")]
    Deadline,
    /// A stream of that name is there, and mirrors nothing.
    #[error("the stream is not a mirror")]
    NotAMirror,
    /// The mirror does not follow.
    #[error("the mirror stands still behind position {origin}, the log is read over HTTP")]
    Stalled {
        /// Where the origin stands.
        origin: Position,
    },
    /// There is no stream yet.
    #[error("the stream does not exist yet")]
    Absent,
}

/// The stream of one epoch in one region.
#[derive(Debug, Clone)]
pub struct Mirror {
    local: Context,
    origin: Context,
    config: Config,
    starts_after: Position,
}

impl Mirror {
    /// The mirror of `stream` in this server, whose origin is in another JetStream domain.
    pub fn new(client: &async_nats::Client, stream: &str, origin_domain: &str) -> Self {
        let local = jetstream::new(client.clone());
        let origin = jetstream::with_domain(client.clone(), origin_domain);
        let external =
            External { api_prefix: format!("$JS.{origin_domain}.API"), delivery_prefix: None };
        let source =
            Source { name: stream.to_owned(), external: Some(external), ..Source::default() };
        // No window for duplicates: the origin has weeded them out, and a mirror that does it again
        // may wait for ever for a number that it dropped.
        let config = Config {
            name: stream.to_owned(),
            storage: StorageType::File,
            num_replicas: 1,
            mirror: Some(source),
            ..Config::default()
        };
        Self { local, origin, config, starts_after: Position::ZERO }
    }

    /// The stream begins after a position. Until it has a message, a mirror does not know that.
    pub fn starting_after(self, starts_after: Position) -> Self {
        Self { starts_after, ..self }
    }

    /// Creates the mirror unless it is there.
    pub async fn ensure(&self) -> Result<(), MirrorError> {
        match info(&self.local, &self.config.name).await? {
            Some(info) if info.config.mirror.is_some() => Ok(()),
            Some(_) => Err(MirrorError::NotAMirror),
            None => {
                let create = timeout(REQUEST_MAX, self.local.create_stream(self.config.clone()));
                create.await.map_err(|_| MirrorError::Deadline)??;
                tracing::info!(stream = self.config.name, "mirror created");
                Ok(())
            }
        }
    }

    /// Where the mirror and its origin stand. The origin's side is `None` when it does not answer:
    /// then the leaf is down, and there is nothing to nudge.
    pub async fn observe(&self) -> Result<Observation, MirrorError> {
        let name = &self.config.name;
        let (here, there) = tokio::join!(info(&self.local, name), info(&self.origin, name));
        let here = here?;
        let active = here.as_ref().and_then(|info| info.mirror.as_ref()?.active);
        Ok(Observation {
            exists: here.is_some(),
            first: here.as_ref().and_then(|info| Position::new(info.state.first_sequence)),
            mirror: here
                .and_then(|info| Position::new(info.state.last_sequence))
                .map(|last| last.max(self.starts_after)),
            origin: there.ok().flatten().and_then(|info| Position::new(info.state.last_sequence)),
            silent: active,
        })
    }

    /// Makes the server connect the mirror again, by an update that leaves it as it is: its limits
    /// are the operator's.
    pub async fn nudge(&self) -> Result<(), MirrorError> {
        let found = info(&self.local, &self.config.name).await?.ok_or(MirrorError::Absent)?;
        let update = timeout(REQUEST_MAX, self.local.update_stream(&found.config));
        update.await.map_err(|_| MirrorError::Deadline)?.map_err(MirrorError::Update)?;
        Ok(())
    }
}

/// The state of a stream; `None` when there is none.
pub async fn info(context: &Context, stream: &str) -> Result<Option<Info>, MirrorError> {
    let got = timeout(REQUEST_MAX, context.get_stream(stream)).await;
    match got.map_err(|_| MirrorError::Deadline)? {
        Ok(stream) => Ok(Some(stream.cached_info().clone())),
        Err(error) => match error.kind() {
            GetStreamErrorKind::JetStream(inner) if inner.code() == 404 => Ok(None),
            GetStreamErrorKind::JetStream(_)
            | GetStreamErrorKind::EmptyName
            | GetStreamErrorKind::Request
            | GetStreamErrorKind::InvalidStreamName => Err(error.into()),
        },
    }
}

/// What one look at the mirror and its origin saw.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Observation {
    /// Whether there is a mirror at all.
    pub exists: bool,
    /// The mirror's first position.
    pub first: Option<Position>,
    /// The mirror's last position.
    pub mirror: Option<Position>,
    /// The origin's last position; `None` when it did not answer.
    pub origin: Option<Position>,
    /// Since when the mirror has heard nothing; `None` when it never heard anything.
    pub silent: Option<Duration>,
}

/// What to do about a mirror.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Care {
    /// It follows, or nobody can tell.
    None,
    /// It is gone.
    Create,
    /// It is gone, and so is its origin, as far as anybody can tell.
    Wait,
    /// It stands still behind an origin that answers.
    Nudge {
        /// Where the origin stands.
        origin: Position,
    },
}

/// Judges a look by the one before it. A mirror that moved since is on its way, however far it has
/// to go.
pub fn care(before: Option<&Observation>, now: &Observation, silence_max: Duration) -> Care {
    if !now.exists {
        // One that is made before its origin is there looks for it again only after a long while.
        return if now.origin.is_some() { Care::Create } else { Care::Wait };
    }
    let stood_still = before.is_some_and(|before| before.mirror == now.mirror);
    let silent = now.silent.is_none_or(|silent| silence_max <= silent);
    match (now.origin, now.mirror) {
        (Some(origin), mirror)
            if stood_still && silent && mirror.unwrap_or(Position::ZERO) < origin =>
        {
            Care::Nudge { origin }
        }
        (Some(_) | None, _) => Care::None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SILENCE_MAX: Duration = Duration::from_secs(2);

    fn seen(mirror: u64, origin: Option<u64>, silent_s: Option<u64>) -> Observation {
        Observation {
            exists: true,
            first: Position::new(1),
            mirror: Position::new(mirror),
            origin: origin.and_then(Position::new),
            silent: silent_s.map(Duration::from_secs),
        }
    }

    fn judged(before: Option<Observation>, now: Observation) -> Care {
        care(before.as_ref(), &now, SILENCE_MAX)
    }

    #[test]
    fn a_silent_mirror_behind_an_origin_that_answers_is_nudged() {
        let origin = Position::new(9).unwrap();
        let before = seen(5, None, Some(20));
        assert_eq!(judged(Some(before), seen(5, Some(9), Some(21))), Care::Nudge { origin });
        assert_eq!(judged(Some(before), seen(5, Some(9), None)), Care::Nudge { origin });
    }

    #[test]
    fn a_mirror_whose_origin_does_not_answer_is_left_alone() {
        let before = seen(5, Some(9), Some(20));
        assert_eq!(judged(Some(before), seen(5, None, Some(21))), Care::None);
    }

    #[test]
    fn a_mirror_that_moves_or_hears_or_has_all_is_left_alone() {
        let before = seen(5, Some(9), Some(20));
        assert_eq!(judged(Some(before), seen(6, Some(9), Some(21))), Care::None, "it moves");
        assert_eq!(judged(Some(before), seen(5, Some(9), Some(1))), Care::None, "it hears");
        assert_eq!(judged(Some(before), seen(5, Some(5), Some(21))), Care::None, "it has all");
        assert_eq!(judged(None, seen(5, Some(9), Some(21))), Care::None, "seen only once");
    }

    #[test]
    fn a_mirror_that_is_gone_is_created_once_its_origin_is_there() {
        let gone = |origin| Observation { exists: false, ..seen(0, origin, None) };
        assert_eq!(judged(None, gone(Some(0))), Care::Create);
        assert_eq!(judged(None, gone(None)), Care::Wait);
    }
}
