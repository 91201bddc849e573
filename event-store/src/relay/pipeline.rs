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
            // While the oldest is not answered, nothing goes past it.
            while self.in_flight_max <= self.acks.in_flight_count() {
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    use async_nats::ConnectOptions;
    use compose::nats::{Server, User};
    use consistency::{AggregateId, CommittedAt, Epoch, Name, Position, SchemaVersion, Version};
    use futures::StreamExt as _;
    use uuid::Uuid;

    use super::*;

    const SENT: u64 = 40;
    const IN_FLIGHT_MAX: usize = 8;

    fn event(nth: u64) -> Event {
        let name = |text: &str| Name::new(text).unwrap();
        Event {
            at: LogPosition::new(Epoch::FIRST, Position::new(nth).unwrap()),
            id: EventId::new(Uuid::from_u128(nth.into())),
            previous_id: EventId::new(Uuid::from_u128((nth - 1).into())),
            aggregate: AggregateId::new(name("note"), "n-1").unwrap(),
            version: Version::new(nth).unwrap(),
            event_type: name("Noted"),
            schema_version: SchemaVersion::FIRST,
            committed_at: CommittedAt::from_unix_micros(0),
            correlation_id: Uuid::nil(),
            causation_id: Uuid::nil(),
            idempotency_key_hash: None,
            traceparent: None,
            data: "{}".to_owned(),
        }
    }

    /// Sends events to a stream that stores all of them and does not answer for some. Says what came of it,
    /// and how many had come there.
    async fn sent_to(unanswered: fn(u64) -> bool) -> (Result<Position, SessionError>, u64) {
        let server = Server::start_single().await.unwrap();
        let connect = async |user| {
            let (name, password) = server.credentials(user);
            let options = ConnectOptions::with_user_and_password(name, password);
            options.connect(server.url()).await.unwrap()
        };
        let (relay, stream) = (connect(User::Relay).await, connect(User::Operator).await);
        let subject = event(1).aggregate.subject();
        let mut messages = stream.subscribe(subject.clone()).await.unwrap();
        // What comes back shows that the server has the subscription. A flush would not.
        stream.publish(subject, "".into()).await.unwrap();
        messages.next().await.unwrap();
        let come = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&come);
        let answering = tokio::spawn(async move {
            while let Some(message) = messages.next().await {
                let nth = counted.fetch_add(1, Ordering::Relaxed) + 1;
                if !unanswered(nth) {
                    let answer = format!(r#"{{"stream":"TIDEMARK","seq":{nth}}}"#);
                    stream.publish(message.reply.unwrap(), answer.into()).await.unwrap();
                }
            }
        });
        let config = RelayConfig {
            in_flight_max: IN_FLIGHT_MAX,
            ack_wait_max: Duration::from_secs(2),
            ..RelayConfig::new("us-east")
        };
        let end = LogPosition::new(Epoch::FIRST, Position::ZERO);
        let mut pipeline = Pipeline::new(&relay, &config, end, EventId::NIL).await.unwrap();
        let sent = async {
            pipeline.send((1..=SENT).map(event).collect()).await?;
            pipeline.drain().await
        };
        let outcome = sent.await.map(|()| pipeline.acknowledged().position);
        answering.abort();
        (outcome, come.load(Ordering::Relaxed))
    }

    #[tokio::test]
    async fn what_is_acknowledged_is_all_that_was_sent() {
        let (outcome, count) = sent_to(|_| false).await;
        assert_eq!((outcome.unwrap().get(), count), (SENT, SENT));
    }

    #[tokio::test]
    async fn no_more_goes_past_a_lost_acknowledgement_than_may_be_in_flight() {
        let (outcome, count) = sent_to(|nth| nth == 7).await;
        let outcome = outcome.unwrap_err();
        assert!(
            matches!(outcome, SessionError::LostPlace("an acknowledgement was lost")),
            "{outcome}"
        );
        assert_eq!(count, 6 + IN_FLIGHT_MAX as u64);
    }
}
