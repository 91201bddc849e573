//! Publishing in order without waiting for each acknowledgement.

use std::time::Duration;

use async_nats::header::NATS_EXPECTED_LAST_SEQUENCE;
use async_nats::{Client, HeaderMap, HeaderName};
use consistency::{Event, EventId, LogPosition, stream_name};
use tokio::time::timeout;

use super::acks::Acks;
use super::session::SessionError;
use crate::RelayConfig;
use crate::bounds::EXPECTED_STREAM_HEADER;

/// Messages on their way to the stream.
pub(super) struct Pipeline<'a> {
    client: &'a Client,
    stream_name: String,
    in_flight_max: usize,
    ack_wait_max: Duration,
    acks: Acks,
    /// The last event that was sent, acknowledged or not.
    sent: LogPosition,
    sent_id: EventId,
}

impl<'a> Pipeline<'a> {
    /// Goes on after the event that the stream ends with.
    pub(super) async fn new(
        client: &'a Client,
        config: &RelayConfig,
        end: LogPosition,
        end_id: EventId,
    ) -> Result<Self, SessionError> {
        Ok(Self {
            client,
            stream_name: stream_name(end.epoch),
            in_flight_max: config.in_flight_max.max(1),
            ack_wait_max: config.ack_wait_max,
            acks: Acks::subscribe(client, end, config.ack_wait_max).await?,
            sent: end,
            sent_id: end_id,
        })
    }

    /// The last event that is known to be on the stream.
    pub(super) fn acknowledged(&self) -> LogPosition {
        self.acks.acknowledged()
    }

    /// The last event that was sent, and its id.
    pub(super) fn sent(&self) -> (LogPosition, EventId) {
        (self.sent, self.sent_id)
    }

    /// Sends the events, which follow those sent before.
    pub(super) async fn send(&mut self, events: Vec<Event>) -> Result<(), SessionError> {
        for event in events {
            self.check_follows(&event)?;
            if self.in_flight_max <= self.acks.in_flight_count() {
                self.acks.settle_some().await?;
            }
            let (at, id) = (event.at, event.id);
            self.publish(event).await?;
            (self.sent, self.sent_id) = (at, id);
        }
        Ok(())
    }

    /// Waits until everything sent is acknowledged.
    pub(super) async fn drain(&mut self) -> Result<(), SessionError> {
        while 0 < self.acks.in_flight_count() {
            self.acks.settle_some().await?;
        }
        Ok(())
    }

    async fn publish(&mut self, event: Event) -> Result<(), SessionError> {
        let headers = headers(&event, &self.stream_name);
        let (subject, reply) = (event.aggregate.subject(), self.acks.expect_next());
        let data = event.data.into_bytes().into();
        let sending = self.client.publish_with_reply_and_headers(subject, reply, headers, data);
        match timeout(self.ack_wait_max, sending).await {
            Ok(sent) => sent.map_err(SessionError::publish),
            Err(_) => Err(SessionError::LostPlace("the connection to NATS takes nothing")),
        }
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

/// The headers of the event's message: a pure function of the row, and what the server is to refuse.
fn headers(event: &Event, stream_name: &str) -> HeaderMap {
    let mut headers = HeaderMap::new();
    for (name, value) in event.headers() {
        headers.insert(HeaderName::from_static(name), value);
    }
    headers.insert(NATS_EXPECTED_LAST_SEQUENCE, event.at.position.previous().to_string());
    headers.insert(HeaderName::from_static(EXPECTED_STREAM_HEADER), stream_name);
    headers
}
