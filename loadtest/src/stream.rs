//! Publishing to the stream as plainly as it can be done: in order, many messages in flight.

use std::collections::VecDeque;

use anyhow::{Context as _, ensure};
use async_nats::HeaderMap;
use async_nats::header::NATS_EXPECTED_LAST_SEQUENCE;
use async_nats::jetstream::Context;
use async_nats::jetstream::message::PublishMessage;
use async_nats::jetstream::stream::{Compression, Config, StorageType};
use bytes::Bytes;
use consistency::{Epoch, Event, stream_name};

/// As many as the relay has.
const IN_FLIGHT_MAX: usize = 2000;

/// A message, ready to be sent.
#[derive(Debug, Clone)]
pub struct Message {
    subject: String,
    headers: HeaderMap,
    data: Bytes,
}

impl Message {
    /// The very message that the relay makes of an event.
    pub fn of(event: Event) -> Self {
        let mut headers = HeaderMap::new();
        for (name, value) in event.headers() {
            headers.insert(name, value);
        }
        headers.insert(NATS_EXPECTED_LAST_SEQUENCE, event.at.position.previous().to_string());
        headers.insert("Nats-Expected-Stream", stream_name(event.at.epoch));
        Self { subject: event.aggregate.subject(), headers, data: event.data.into() }
    }

    fn publish(self) -> PublishMessage {
        PublishMessage::build().headers(self.headers).payload(self.data)
    }
}

/// The stream of the first epoch, made anew and empty. Kept like the relay's.
pub async fn create(context: &Context) -> anyhow::Result<()> {
    // It is not there the first time.
    let _ = context.delete_stream(stream_name(Epoch::FIRST)).await;
    let config = Config {
        name: stream_name(Epoch::FIRST),
        subjects: vec!["events.>".to_owned()],
        storage: StorageType::File,
        compression: Some(Compression::S2),
        ..Config::default()
    };
    context.create_stream(config).await?;
    Ok(())
}

/// Publishes all of them and waits until the last one is acknowledged.
pub async fn publish(
    context: &Context,
    messages: impl IntoIterator<Item = Message>,
) -> anyhow::Result<()> {
    let mut in_flight = VecDeque::with_capacity(IN_FLIGHT_MAX);
    let mut published = 0;
    for message in messages {
        if in_flight.len() == IN_FLIGHT_MAX {
            let oldest: async_nats::jetstream::context::PublishAckFuture =
                in_flight.pop_front().context("something is in flight")?;
            published = oldest.await?.sequence;
        }
        let subject = message.subject.clone();
        in_flight.push_back(context.send_publish(subject, message.publish()).await?);
    }
    for acknowledgement in in_flight {
        let sequence = acknowledgement.await?.sequence;
        ensure!(published < sequence, "acknowledged out of order");
        published = sequence;
    }
    Ok(())
}
