//! The log as it is streamed to a region that asks for it in the compact form.
//!
//! Lines of JSON. An object with `headers` names the headers of the events that follow; each array is one
//! event, the values of those headers in that order and its data last. The events are the same, to the
//! byte, as those of the plain form, of which the names would be half.

use std::sync::Arc;

use bytes::Bytes;
use consistency::{Epoch, Event, Position};
use event_store::EventStore;
use futures::StreamExt as _;
use http::{HeaderMap, StatusCode, header};
use http_body_util::StreamBody;
use hyper::body::Frame;
use serde::Serialize;
use tokio::time::{Instant, sleep_until};

use crate::{
    answer::Answer,
    body::{Body, BodyError},
    error::Error,
    log_rate::LogRate,
};

/// The media type of the compact form.
pub const COMPACT: &str = "application/vnd.tidemark.log";
/// Events that are read at a time, so that no more of a page is in memory.
const CHUNK_EVENTS_MAX: u32 = 500;

/// Whether a region asked for the compact form.
pub fn is_asked_for(headers: &HeaderMap) -> bool {
    let accepted = headers.get(header::ACCEPT).and_then(|accept| accept.to_str().ok());
    accepted.is_some_and(|accepted| accepted.split(',').any(|kind| kind.trim() == COMPACT))
}

/// A stretch of the log that is on its way.
pub struct Stretch {
    /// Where it comes from.
    pub store: EventStore,
    /// How fast it may go.
    pub rate: Arc<LogRate>,
    /// Who gets it.
    pub region: String,
    /// The epoch that is asked for.
    pub epoch: Epoch,
    /// The last event that is not in it any more.
    pub after: Position,
    /// Events that are left to be sent at most.
    pub left: u32,
    /// When it is cut short. Its reader goes on from where it ended.
    pub deadline: Instant,
}

#[derive(Serialize)]
struct Names<'a> {
    headers: &'a [&'static str],
}

/// What was not sent yet.
struct Sending {
    stretch: Stretch,
    names: Vec<&'static str>,
}

impl Stretch {
    /// Reads the beginning, so that what is wrong is said before anything is sent, and streams the rest as
    /// fast as it is taken, its region's rate allows and the log is read.
    pub async fn answer(self) -> Result<Answer, Error> {
        let mut sending = Sending { stretch: self, names: Vec::new() };
        let Some(first) = sending.read().await? else {
            return Ok(Answer::typed(StatusCode::OK, COMPACT, Bytes::new()));
        };
        if !sending.has_its_turn(&first).await {
            return Err(Error::Overloaded);
        }
        let first = futures::stream::iter([Ok(Frame::data(first))]);
        let rest = futures::stream::unfold(sending, |mut sending| async move {
            let piece = sending.piece().await?;
            Some((piece.map(Frame::data), sending))
        });
        let body = Body::stream(StreamBody::new(first.chain(rest)));
        Ok(Answer { body, ..Answer::typed(StatusCode::OK, COMPACT, Bytes::new()) })
    }
}

impl Sending {
    /// The next piece, when its time has come; `None` at the end, and when its time comes too late.
    async fn piece(&mut self) -> Option<Result<Bytes, BodyError>> {
        let piece = match self.read().await {
            Ok(read) => read?,
            Err(error) => return Some(Err(BodyError::Broken(Box::new(error)))),
        };
        self.has_its_turn(&piece).await.then_some(Ok(piece))
    }

    /// Waits until the region may have so much; `false` at once when that is too late.
    async fn has_its_turn(&self, piece: &Bytes) -> bool {
        let Stretch { rate, region, deadline, .. } = &self.stretch;
        let Some(ready) = rate.take(region, piece.len(), Instant::now(), *deadline) else {
            return false;
        };
        sleep_until(ready).await;
        true
    }

    async fn read(&mut self) -> Result<Option<Bytes>, Error> {
        let Stretch { store, epoch, after, left, deadline, .. } = &mut self.stretch;
        if *left == 0 || *deadline < Instant::now() {
            return Ok(None);
        }
        let events = store.read_range(*after, CHUNK_EVENTS_MAX.min(*left)).await;
        let events = events.map_err(|error| Error::unreachable("its log cannot be read", error))?;
        let mut piece = Vec::new();
        // What a later epoch took over bears its number: it may stand where another event was in this one.
        for event in events.iter().take_while(|event| event.at.epoch <= *epoch) {
            write(&mut self.names, event, &mut piece)?;
            *after = event.at.position;
            *left -= 1;
        }
        Ok((!piece.is_empty()).then(|| Bytes::from(piece)))
    }
}

fn write(names: &mut Vec<&'static str>, event: &Event, piece: &mut Vec<u8>) -> Result<(), Error> {
    let headers = event.headers();
    let own = headers.iter().map(|(name, _)| *name);
    if !own.clone().eq(names.iter().copied()) {
        *names = own.collect();
        line(&Names { headers: names }, piece)?;
    }
    let values: Vec<&str> =
        headers.iter().map(|(_, value)| value.as_str()).chain([event.data.as_str()]).collect();
    line(&values, piece)
}

fn line(what: &impl Serialize, piece: &mut Vec<u8>) -> Result<(), Error> {
    let written = serde_json::to_writer(&mut *piece, what);
    written.map_err(|error| Error::Internal(Box::new(error)))?;
    piece.push(b'\n');
    Ok(())
}
