//! Lets released readers through in a stream: so many at once, in the order they were released, each as
//! another is done. One commit may release thousands, and what else goes on has to go on.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
};

use tokio::sync::oneshot;

/// Told to a reader when it is its turn.
pub type Release = oneshot::Sender<Turn>;

/// The line of released readers.
#[derive(Debug)]
pub struct Turns(Arc<Line>);

/// A released reader's turn. When it is dropped, it is the next one's.
#[derive(Debug)]
pub struct Turn(Option<Arc<Line>>);

#[derive(Debug)]
struct Line {
    turns_max: usize,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    taken: usize,
    released: VecDeque<Release>,
}

impl Turns {
    /// So many at once, one at least.
    pub fn new(turns_max: usize) -> Self {
        Self(Arc::new(Line { turns_max: turns_max.max(1), state: Mutex::default() }))
    }

    /// Puts readers at the end of the line.
    pub fn release(&self, released: Vec<Release>) {
        if released.is_empty() {
            return;
        }
        let mut state = self.0.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.released.extend(released);
        drop(state);
        Line::pass_on(&self.0);
    }
}

impl Line {
    fn pass_on(line: &Arc<Self>) {
        while let Some(release) = line.next() {
            if let Err(mut missed) = release.send(Turn(Some(Arc::clone(line)))) {
                // Hung up meanwhile. Taken apart here, so that thousands of them do not nest.
                missed.0 = None;
                line.give_back();
            }
        }
    }

    fn next(&self) -> Option<Release> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if self.turns_max <= state.taken {
            return None;
        }
        let next = state.released.pop_front()?;
        state.taken += 1;
        Some(next)
    }

    fn give_back(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.taken = state.taken.saturating_sub(1);
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        if let Some(line) = self.0.take() {
            line.give_back();
            Line::pass_on(&line);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn released_readers_go_one_after_another_and_those_who_hung_up_are_passed_over() {
        let turns = Turns::new(2);
        let (releases, mut readers): (Vec<_>, VecDeque<_>) =
            (0..5).map(|_| oneshot::channel()).unzip();
        turns.release(releases);
        let first = readers.pop_front().unwrap().try_recv().unwrap();
        let second = readers.pop_front().unwrap().try_recv().unwrap();
        assert!(readers[0].try_recv().is_err(), "two at once");
        drop(readers.pop_front());
        drop(first);
        let fourth = readers.pop_front().unwrap().try_recv();
        assert!(fourth.is_ok(), "the third hung up, so it is the fourth's turn");
        assert!(readers[0].try_recv().is_err());
        drop(second);
        // It has its turn, and hangs up before it knows.
        drop(readers);
        drop(fourth);
        assert_eq!(turns.0.state.lock().unwrap().taken, 0, "every turn was given back");
    }

    #[test]
    fn thousands_who_hung_up_are_passed_over_at_once() {
        let turns = Turns::new(1);
        let (releases, readers): (Vec<_>, Vec<_>) = (0..50_000).map(|_| oneshot::channel()).unzip();
        drop(readers);
        turns.release(releases);
        let (last, mut reader) = oneshot::channel();
        turns.release(vec![last]);
        assert!(reader.try_recv().is_ok());
    }
}
