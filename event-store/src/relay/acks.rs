//! The stream's answers to what a session publishes: one inbox for all of them, each under the position of
//! its event. A future, a timer and a channel for each would cost more than the answer does.

use std::collections::VecDeque;
use std::time::Duration;

use async_nats::jetstream::{self, ErrorCode};
use async_nats::{Client, Message, StatusCode, Subscriber};
use consistency::{LogPosition, Position};
use futures::{FutureExt as _, StreamExt as _};
use serde::Deserialize;
use tokio::time::timeout;

use super::session::SessionError;

pub(super) struct Acks {
    inbox: String,
    answers: Subscriber,
    wait_max: Duration,
    in_flight: InFlight,
}

impl Acks {
    /// For what is sent after the event that the stream ends with.
    pub async fn subscribe(
        client: &Client,
        end: LogPosition,
        wait_max: Duration,
    ) -> Result<Self, SessionError> {
        let inbox = client.new_inbox();
        let answers = timeout(wait_max, client.subscribe(format!("{inbox}.*"))).await;
        let answers = answers.map_err(SessionError::stream)?.map_err(SessionError::stream)?;
        Ok(Self { inbox, answers, wait_max, in_flight: InFlight::after(end) })
    }

    /// The last event that is known to be on the stream.
    pub fn acknowledged(&self) -> LogPosition {
        self.in_flight.acknowledged
    }

    /// How many events wait for their acknowledgement.
    pub fn in_flight_count(&self) -> usize {
        self.in_flight.are_acknowledged.len()
    }

    /// Where the next event's answer is to come.
    pub fn expect_next(&mut self) -> String {
        format!("{}.{}", self.inbox, self.in_flight.expect_next())
    }

    /// Waits for an answer, and takes all that have come.
    pub async fn settle_some(&mut self) -> Result<(), SessionError> {
        let answer = timeout(self.wait_max, self.answers.next()).await;
        let lost = |_| SessionError::LostPlace("an acknowledgement was lost");
        let mut answer = Some(answer.map_err(lost)?);
        while let Some(come) = answer {
            let come = come.ok_or(SessionError::Disconnected)?;
            self.in_flight.settle(self.answered(&come), come.status, &come.payload)?;
            answer = self.answers.next().now_or_never();
        }
        Ok(())
    }

    /// The position that a message answers.
    fn answered(&self, answer: &Message) -> Option<Position> {
        let position = answer.subject.strip_prefix(self.inbox.as_str())?.strip_prefix('.')?;
        Position::new(position.parse().ok()?)
    }
}

/// What was sent and is not known to be on the stream.
struct InFlight {
    /// The last event that is, with all before it.
    acknowledged: LogPosition,
    /// Of each event after it: whether it was acknowledged, before one that was sent earlier.
    are_acknowledged: VecDeque<bool>,
}

/// What the stream answers.
#[derive(Deserialize)]
struct Answer {
    #[serde(default)]
    seq: u64,
    error: Option<jetstream::Error>,
}

impl InFlight {
    fn after(end: LogPosition) -> Self {
        Self { acknowledged: end, are_acknowledged: VecDeque::new() }
    }

    fn expect_next(&mut self) -> Position {
        self.are_acknowledged.push_back(false);
        self.acknowledged.position.plus(self.are_acknowledged.len() as u64)
    }

    fn settle(
        &mut self,
        position: Option<Position>,
        status: Option<StatusCode>,
        payload: &[u8],
    ) -> Result<(), SessionError> {
        if status == Some(StatusCode::NO_RESPONDERS) {
            return Err(SessionError::LostPlace("the stream is gone"));
        }
        let answer: Answer = serde_json::from_slice(payload).map_err(SessionError::stream)?;
        if let Some(error) = answer.error {
            return Err(match error.error_code() {
                ErrorCode::STREAM_WRONG_LAST_SEQUENCE => {
                    SessionError::LostPlace("the stream does not end where it did")
                }
                _ => SessionError::stream(error),
            });
        }
        let waiting = position.and_then(|position| self.waiting(position));
        let Some((position, waiting)) = position.zip(waiting) else {
            return Err(SessionError::LostPlace("an answer came to nothing that was asked"));
        };
        if answer.seq != position.get() {
            return Err(SessionError::LostPlace("an event came to stand at another sequence"));
        }
        *waiting = true;
        while self.are_acknowledged.pop_front_if(|is_acknowledged| *is_acknowledged).is_some() {
            let LogPosition { epoch, position } = self.acknowledged;
            self.acknowledged = LogPosition::new(epoch, position.next());
        }
        Ok(())
    }

    fn waiting(&mut self, position: Position) -> Option<&mut bool> {
        let place = position.get().checked_sub(self.acknowledged.position.next().get())?;
        self.are_acknowledged.get_mut(usize::try_from(place).ok()?)
    }
}

#[cfg(test)]
mod tests {
    use consistency::Epoch;

    use super::*;

    fn position(value: u64) -> Position {
        Position::new(value).unwrap()
    }

    /// Seven, eight and nine wait.
    fn three() -> InFlight {
        let mut three = InFlight::after(LogPosition::new(Epoch::FIRST, position(6)));
        assert_eq!([(); 3].map(|()| three.expect_next().get()), [7, 8, 9]);
        three
    }

    fn ack(in_flight: &mut InFlight, asked: u64, stands_at: u64) -> Result<u64, String> {
        let payload = format!(r#"{{"stream":"TIDEMARK-1","seq":{stands_at}}}"#);
        settle(in_flight, asked, None, &payload)
    }

    fn settle(
        in_flight: &mut InFlight,
        asked: u64,
        status: Option<StatusCode>,
        payload: &str,
    ) -> Result<u64, String> {
        let settled = in_flight.settle(Position::new(asked), status, payload.as_bytes());
        settled.map_err(|error| error.to_string())?;
        Ok(in_flight.acknowledged.position.get())
    }

    #[test]
    fn an_event_is_on_the_stream_once_all_before_it_are() {
        let mut in_flight = three();
        assert_eq!(ack(&mut in_flight, 8, 8), Ok(6));
        assert_eq!(ack(&mut in_flight, 9, 9), Ok(6));
        assert_eq!(ack(&mut in_flight, 7, 7), Ok(9));
        assert_eq!(in_flight.are_acknowledged.len(), 0);
        assert_eq!(in_flight.expect_next().get(), 10);
        assert_eq!(ack(&mut in_flight, 10, 10), Ok(10));
    }

    #[test]
    fn what_was_not_asked_or_stands_elsewhere_ends_the_session() {
        for asked in [0, 6, 10, u64::MAX] {
            let settled = ack(&mut three(), asked, asked).unwrap_err();
            assert_eq!(settled, "an answer came to nothing that was asked", "{asked}");
        }
        let settled = ack(&mut three(), 7, 8).unwrap_err();
        assert_eq!(settled, "an event came to stand at another sequence");
    }

    #[test]
    fn what_the_stream_refuses_is_told_apart() {
        let of = |payload: &str| settle(&mut three(), 7, None, payload).unwrap_err();
        let wrong = r#"{"error":{"code":400,"err_code":10071,"description":"wrong last sequence: 9"},"seq":0}"#;
        assert_eq!(of(wrong), "the stream does not end where it did");
        let full =
            r#"{"error":{"code":503,"err_code":10077,"description":"maximum messages exceeded"}}"#;
        let other = "the stream could not be read, created, subscribed to or published to";
        assert_eq!(of(full), other);
        assert_eq!(of("what"), other);
        let gone = settle(&mut three(), 7, Some(StatusCode::NO_RESPONDERS), "").unwrap_err();
        assert_eq!(gone, "the stream is gone");
    }
}
