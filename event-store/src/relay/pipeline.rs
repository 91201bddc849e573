//! Publishing in order without waiting for each acknowledgement.

use std::collections::VecDeque;

use async_nats::header::NATS_EXPECTED_LAST_SEQUENCE;
use async_nats::jetstream::context::{Context, PublishAckFuture};
use async_nats::jetstream::message::PublishMessage;
use async_nats::{HeaderMap, HeaderName};
use bytes::Bytes;
use consistency::{Event, EventId, LogPosition, Position, stream_name};

use super::session::SessionError;
use crate::bounds::EXPECTED_STREAM_HEADER;

/// Messages on their way to the stream.
pub(super) struct Pipeline<'a> {
    context: &'a Context,
    stream_name: String,
    in_flight_max: usize,
    in_flight: VecDeque<(Position, PublishAckFuture)>,
    /// The last event that was sent, acknowledged or not.
    sent: LogPosition,
    sent_id: EventId,
    /// The last event that is known to be on the stream.
    acknowledged: LogPosition,
}

impl<'a> Pipeline<'a> {
    /// Goes on after the event that the stream ends with.
    pub(super) fn new(
        context: &'a Context,
        in_flight_max: usize,
        end: LogPosition,
        end_id: EventId,
    ) -> Self {
        Self {
            context,
            stream_name: stream_name(end.epoch),
            in_flight_max: in_flight_max.max(1),
            in_flight: VecDeque::new(),
            sent: end,
            sent_id: end_id,
            acknowledged: end,
        }
    }

    /// The last event that is known to be on the stream.
    pub(super) fn acknowledged(&self) -> LogPosition {
        self.acknowledged
    }

    /// The last event that was sent, and its id.
    pub(super) fn sent(&self) -> (LogPosition, EventId) {
        (self.sent, self.sent_id)
    }

    /// Sends the events, which follow those sent before.
    pub(super) async fn send(&mut self, events: Vec<Event>) -> Result<(), SessionError> {
        for event in events {
            self.check_follows(&event)?;
            if self.in_flight.len() >= self.in_flight_max {
                self.settle_oldest().await?;
            }
            let (position, id) = (event.at.position, event.id);
            let message = message(event, &self.stream_name);
            let ack = self
                .context
                .send_publish(message.subject, message.publish)
                .await
                .map_err(SessionError::publish)?;
            self.in_flight.push_back((position, ack));
            self.sent = LogPosition::new(self.sent.epoch, position);
            self.sent_id = id;
        }
        Ok(())
    }

    /// Waits until everything sent is acknowledged.
    pub(super) async fn drain(&mut self) -> Result<(), SessionError> {
        while !self.in_flight.is_empty() {
            self.settle_oldest().await?;
        }
        Ok(())
    }

    async fn settle_oldest(&mut self) -> Result<(), SessionError> {
        let Some((position, ack)) = self.in_flight.pop_front() else { return Ok(()) };
        let ack = ack.await.map_err(SessionError::publish)?;
        if ack.sequence != position.get() {
            return Err(SessionError::LostPlace("an event came to stand at another sequence"));
        }
        self.acknowledged = LogPosition::new(self.acknowledged.epoch, position);
        Ok(())
    }

    /// A log that was restored under a running relay shows here, before the stream refuses anything.
    fn check_follows(&self, event: &Event) -> Result<(), SessionError> {
        if event.at.epoch != self.sent.epoch {
            Err(SessionError::LostPlace("the log opened another epoch"))
        } else if event.at.position != self.sent.position.next() {
            Err(SessionError::LostPlace("the log skipped a position"))
        } else if event.previous_id != self.sent_id {
            Err(SessionError::LostPlace("the log does not continue what was published"))
        } else {
            Ok(())
        }
    }
}

struct Message {
    subject: String,
    publish: PublishMessage,
}

/// The event's message for its stream: a pure function of the row.
fn message(event: Event, stream_name: &str) -> Message {
    let mut headers = HeaderMap::new();
    for (name, value) in event.headers() {
        headers.insert(HeaderName::from_static(name), value);
    }
    headers.insert(NATS_EXPECTED_LAST_SEQUENCE, event.at.position.previous().to_string());
    headers.insert(HeaderName::from_static(EXPECTED_STREAM_HEADER), stream_name);
    let subject = event.aggregate.subject();
    let publish =
        PublishMessage::build().headers(headers).payload(Bytes::from(event.data.into_bytes()));
    Message { subject, publish }
}
