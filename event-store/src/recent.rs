//! The last events that this process committed, kept for its relay, which need not read them back.
//!
//! They are what the rows are, to the byte: what the caller gave and what the database answered. The id of the
//! event before the first of a commit is the database's word too, so a log that was restored behind our
//! back shows in the chain here as it does in the table.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use consistency::{Event, EventId, LogPosition, Position};

use crate::Once;
use crate::append::{Appended, Command};
use crate::commit::Answer;

/// Most events that are kept.
const EVENTS_MAX: usize = 4096;
/// Most bytes of their data.
const DATA_BYTES_MAX: usize = 8 * 1024 * 1024;

/// Nothing is kept unless somebody [follows](Self::follow).
#[derive(Debug, Default)]
pub(crate) struct Recent {
    kept: Mutex<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    is_followed: bool,
    /// One after the other in the log, without holes.
    events: VecDeque<Event>,
    data_bytes: usize,
}

/// Whoever follows what is committed. Ends with the value.
#[derive(Debug)]
pub(crate) struct Follower {
    recent: Arc<Recent>,
}

impl Recent {
    /// Begins to keep what is committed. There is one follower at a time, since it takes what it reads.
    pub fn follow(self: &Arc<Self>) -> Follower {
        self.kept().is_followed = true;
        Follower { recent: Arc::clone(self) }
    }

    /// Keeps what the commands of one commit became. `before` is the event that the log ended with before.
    pub fn keep(&self, before: EventId, commands: &[Arc<Command>], answers: &[Answer]) {
        let mut kept = self.kept();
        if !kept.is_followed {
            return;
        }
        let mut previous_id = before;
        for (command, answer) in commands.iter().zip(answers) {
            if let Ok(Once::Appended(appended)) = answer {
                for event in events(command, appended, previous_id) {
                    previous_id = event.id;
                    kept.push(event);
                }
            }
        }
    }

    fn kept(&self) -> std::sync::MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kept {
    fn push(&mut self, event: Event) {
        let follows = |last: &Event| {
            last.at.epoch == event.at.epoch && last.at.position.next() == event.at.position
        };
        // Between them is what another process appended.
        if !self.events.back().is_none_or(follows) {
            self.clear();
        }
        self.data_bytes += event.data.len();
        self.events.push_back(event);
        while EVENTS_MAX < self.events.len() || DATA_BYTES_MAX < self.data_bytes {
            self.pop();
        }
    }

    fn pop(&mut self) -> Option<Event> {
        let event = self.events.pop_front()?;
        self.data_bytes -= event.data.len();
        Some(event)
    }

    fn clear(&mut self) {
        self.events.clear();
        self.data_bytes = 0;
    }
}

impl Follower {
    /// Takes the events after a position, no more than so many; `None` when the next one is not here. What is
    /// before them is not kept any longer.
    pub fn take_after(&self, after: Position, count_max: usize) -> Option<Vec<Event>> {
        let mut kept = self.recent.kept();
        while kept.events.front().is_some_and(|event| event.at.position <= after) {
            kept.pop();
        }
        if kept.events.front()?.at.position != after.next() {
            return None;
        }
        let count = kept.events.len().min(count_max);
        Some(std::iter::from_fn(|| kept.pop()).take(count).collect())
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        let mut kept = self.recent.kept();
        kept.is_followed = false;
        kept.clear();
    }
}

/// The rows that an append became.
fn events<'a>(
    command: &'a Command,
    appended: &'a Appended,
    before: EventId,
) -> impl Iterator<Item = Event> + 'a {
    let append = &command.append;
    let ids = append.events.iter().map(|event| event.id);
    let previous_ids = std::iter::once(before).chain(ids);
    (0..).zip(&append.events).zip(previous_ids).map(|((nth, event), previous_id)| Event {
        at: LogPosition::new(appended.epoch, appended.first_position.plus(nth)),
        id: event.id,
        previous_id,
        aggregate: append.aggregate.clone(),
        version: appended.first_version.plus(nth),
        event_type: event.event_type.clone(),
        schema_version: event.schema_version,
        committed_at: appended.committed_at,
        correlation_id: append.correlation_id,
        causation_id: append.causation_id,
        idempotency_key_hash: append.idempotency_key_hash,
        traceparent: append.traceparent.clone(),
        data: event.data.clone(),
    })
}

#[cfg(test)]
mod tests {
    use consistency::{AggregateId, CommittedAt, Epoch, Name, SchemaVersion, Version};
    use uuid::Uuid;

    use super::*;
    use crate::append::{Append, Expected, NewEvent};
    use crate::{AppendError, Repeat};

    fn id(n: u128) -> EventId {
        EventId::new(Uuid::from_u128(n))
    }

    fn at(position: u64) -> Position {
        Position::new(position).unwrap()
    }

    /// A command of events with these ids.
    fn command(ids: &[u128], data: &str) -> Arc<Command> {
        let event = |n: &u128| NewEvent {
            id: id(*n),
            event_type: Name::new("Noted").unwrap(),
            schema_version: SchemaVersion::FIRST,
            data: data.to_owned(),
        };
        let append = Append {
            aggregate: AggregateId::new(Name::new("note").unwrap(), "a").unwrap(),
            expected: Expected::Any,
            events: ids.iter().map(event).collect(),
            correlation_id: Uuid::nil(),
            causation_id: Uuid::nil(),
            idempotency_key_hash: None,
            traceparent: None,
        };
        Arc::new(Command { append, idempotency: None, judged: None })
    }

    fn appended(command: &Command, epoch: u32, first_position: u64) -> Answer {
        Ok(Once::Appended(Appended {
            epoch: Epoch::new(epoch).unwrap(),
            first_version: Version::new(1).unwrap(),
            first_position: at(first_position),
            committed_at: CommittedAt::from_unix_micros(0),
            event_ids: command.append.events.iter().map(|event| event.id).collect(),
        }))
    }

    fn keep(recent: &Recent, before: u128, ids: &[u128], epoch: u32, first_position: u64) {
        let command = command(ids, "{}");
        let answer = appended(&command, epoch, first_position);
        recent.keep(id(before), &[command], &[answer]);
    }

    fn taken(follower: &Follower, after: u64, count_max: usize) -> Option<Vec<(u64, EventId)>> {
        let events = follower.take_after(at(after), count_max)?;
        Some(events.iter().map(|event| (event.at.position.get(), event.previous_id)).collect())
    }

    #[test]
    fn what_was_appended_follows_what_was_there_and_the_rest_of_a_commit_is_passed_over() {
        let recent = Arc::new(Recent::default());
        let follower = recent.follow();
        let commands =
            [command(&[1, 2], "{}"), command(&[3], "{}"), command(&[4], "{}"), command(&[5], "{}")];
        let answers = [
            appended(&commands[0], 1, 10),
            Err(AppendError::Stopping),
            Ok(Once::Repeated(Repeat::Mismatched)),
            appended(&commands[3], 1, 12),
        ];
        recent.keep(id(9), &commands, &answers);
        let all = vec![(10, id(9)), (11, id(1)), (12, id(2))];
        assert_eq!(taken(&follower, 9, 9), Some(all));
        assert_eq!(taken(&follower, 9, 9), None, "it is taken once");
    }

    #[test]
    fn only_what_comes_next_is_given() {
        let recent = Arc::new(Recent::default());
        let follower = recent.follow();
        keep(&recent, 9, &[1, 2, 3, 4], 1, 10);
        assert_eq!(taken(&follower, 8, 9), None, "9 is not here");
        assert_eq!(taken(&follower, 10, 2), Some(vec![(11, id(1)), (12, id(2))]));
        assert_eq!(taken(&follower, 13, 9), None, "13 was the last");
        assert_eq!(recent.kept().data_bytes, 0);
    }

    #[test]
    fn a_hole_or_another_epoch_begins_anew() {
        let recent = Arc::new(Recent::default());
        let follower = recent.follow();
        keep(&recent, 9, &[1], 1, 10);
        // 11 is another process's.
        keep(&recent, 7, &[2], 1, 12);
        assert_eq!(taken(&follower, 9, 9), None);
        assert_eq!(taken(&follower, 11, 9), Some(vec![(12, id(7))]));
        keep(&recent, 2, &[3], 1, 13);
        keep(&recent, 8, &[4], 2, 14);
        assert_eq!(taken(&follower, 12, 9), None);
        assert_eq!(taken(&follower, 13, 9), Some(vec![(14, id(8))]));
    }

    #[test]
    fn nothing_is_kept_for_nobody() {
        let recent = Arc::new(Recent::default());
        keep(&recent, 9, &[1], 1, 10);
        drop(recent.follow());
        keep(&recent, 1, &[2], 1, 11);
        let follower = recent.follow();
        assert_eq!(taken(&follower, 9, 9), None);
        assert_eq!(taken(&follower, 10, 9), None);
        keep(&recent, 2, &[3], 1, 12);
        drop(follower);
        let kept = recent.kept();
        assert!(kept.events.is_empty() && kept.data_bytes == 0);
    }

    #[test]
    fn the_oldest_give_way_to_the_newest() {
        let recent = Arc::new(Recent::default());
        let follower = recent.follow();
        let count = EVENTS_MAX as u64 + 10;
        for nth in 1..=count {
            keep(&recent, u128::from(nth) - 1, &[u128::from(nth)], 1, nth);
        }
        assert_eq!(taken(&follower, 9, 9), None);
        assert_eq!(follower.take_after(at(10), usize::MAX).unwrap().len(), EVENTS_MAX);

        let large = "x".repeat(DATA_BYTES_MAX / 2 + 1);
        for nth in 1..=3 {
            let command = command(&[nth], &large);
            let answer = appended(&command, 1, count + nth as u64);
            recent.keep(id(0), &[command], &[answer]);
        }
        assert_eq!(recent.kept().events.len(), 1);
        assert_eq!(taken(&follower, count + 2, 9).unwrap().len(), 1);
        assert_eq!(recent.kept().data_bytes, 0);
    }
}
