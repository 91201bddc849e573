use std::{sync::Arc, time::Duration};

use consistency::{Announcement, Epoch, LogPosition, Name, Position};
use tokio::time::Instant;

use super::*;

fn name() -> Name {
    Name::new("orders").unwrap()
}

fn at(position: u64) -> LogPosition {
    LogPosition::new(Epoch::FIRST, Position::new(position).unwrap())
}

fn currency(waiters_max: usize, checkpoints: &[u64]) -> Arc<Currency> {
    let bounds = WaiterBounds { waiters_max, per_caller_max: 1, released_max: 10 };
    let currency = Currency::new([name()], bounds);
    observe(&currency, currency.moment(&name()), checkpoints);
    Arc::new(currency)
}

fn observe(currency: &Currency, moment: u64, checkpoints: &[u64]) {
    let checkpoints = (0..).zip(checkpoints.iter().map(|position| Some(at(*position))));
    let seen =
        Observation { moment, version: 1, partition_count: 2, checkpoints: checkpoints.collect() };
    currency.observed(&name(), &seen, Instant::now());
}

fn announce(currency: &Currency, partition: u16, stored: u64, to: u64) {
    let position = |value| Position::new(value).unwrap();
    let said = Announcement {
        region: "eu-west".to_owned(),
        epoch: Epoch::FIRST,
        projection: name(),
        version: 1,
        partition,
        from: Position::ZERO,
        to: position(to),
        stored: position(stored),
        head: position(to),
        keys: None,
    };
    currency.heard(&said, Instant::now());
}

fn reached(currency: &Currency, partitions: Partitions) -> Option<LogPosition> {
    currency.standing(&name(), partitions).watermark
}

fn within(ms: u64) -> WaitBounds {
    let reached = Instant::now() + Duration::from_millis(ms);
    WaitBounds { reached, turn: reached }
}

fn soon() -> WaitBounds {
    within(60_000)
}

#[tokio::test]
async fn a_wait_for_all_ends_with_the_last_partition() {
    let currency = currency(10, &[5, 5]);
    let waiting = Arc::clone(&currency);
    let wait =
        tokio::spawn(
            async move { waiting.wait(&name(), Partitions::All, at(7), soon(), None).await },
        );
    while currency.waiter_count() == 0 {
        tokio::task::yield_now().await;
    }
    announce(&currency, 0, 9, 9);
    tokio::task::yield_now().await;
    assert_eq!(currency.waiter_count(), 1, "partition 1 is not there yet");
    announce(&currency, 1, 7, 7);
    assert!(matches!(wait.await.unwrap(), Ok(Waited::Satisfied(Some(_)))));
    assert_eq!(currency.waiter_count(), 0);
}

#[tokio::test(start_paused = true)]
async fn who_times_out_or_hangs_up_leaves_no_waiter() {
    let currency = currency(10, &[5, 5]);
    let waited = currency.wait(&name(), Partitions::One(0), at(7), within(5), None).await;
    assert!(matches!(waited, Ok(Waited::TimedOut)));
    assert_eq!(currency.waiter_count(), 0);
    let waiting = Arc::clone(&currency);
    let wait =
        tokio::spawn(
            async move { waiting.wait(&name(), Partitions::All, at(7), soon(), None).await },
        );
    while currency.waiter_count() == 0 {
        tokio::task::yield_now().await;
    }
    wait.abort();
    assert!(wait.await.is_err());
    assert_eq!(currency.waiter_count(), 0);
    assert!(!currency.wants_poll(Duration::ZERO, Instant::now()));
}

#[tokio::test]
async fn waiters_beyond_the_cap_are_refused_and_leave_nothing() {
    let currency = currency(0, &[5, 5]);
    let waited = currency.wait(&name(), Partitions::One(1), at(7), soon(), None).await;
    assert_eq!((waited.err(), currency.waiter_count()), (Some(WaitRefused::Full), 0));
    let satisfied = currency.wait(&name(), Partitions::One(1), at(5), soon(), None).await;
    assert!(
        matches!(satisfied, Ok(Waited::Satisfied(None))),
        "no place is needed by who need not wait"
    );
}

#[test]
fn a_snapshot_older_than_a_hint_takes_nothing_back_and_a_newer_one_does() {
    let currency = currency(10, &[5, 5]);
    let before = currency.moment(&name());
    announce(&currency, 0, 9, 9);
    observe(&currency, before, &[6]);
    assert_eq!(reached(&currency, Partitions::One(0)), Some(at(9)));
    observe(&currency, currency.moment(&name()), &[6]);
    assert_eq!(reached(&currency, Partitions::One(0)), Some(at(6)), "the database went back");
}

#[test]
fn an_idle_proof_counts_on_top_of_the_checkpoint_it_extends() {
    let currency = currency(10, &[5, 5]);
    announce(&currency, 0, 5, 20);
    assert_eq!(reached(&currency, Partitions::One(0)), Some(at(20)));
    let mark = |checkpoint| currency.watermark(&name(), 1, 0, Some(at(checkpoint)));
    assert_eq!((mark(5), mark(4)), (Some(at(20)), Some(at(4))));
    assert_eq!(currency.watermark(&name(), 2, 0, Some(at(5))), Some(at(5)), "of another version");
}

#[test]
fn hints_of_a_version_that_is_not_read_say_nothing() {
    let currency = currency(10, &[5, 5]);
    let seen = Observation {
        moment: currency.moment(&name()),
        version: 2,
        partition_count: 2,
        checkpoints: vec![(0, Some(at(3)))],
    };
    currency.observed(&name(), &seen, Instant::now());
    announce(&currency, 0, 9, 9);
    assert_eq!(reached(&currency, Partitions::One(0)), Some(at(3)));
    assert_eq!(reached(&currency, Partitions::All), None, "partition 1 is unknown");
}

#[tokio::test]
async fn one_partition_that_falls_silent_is_polled_for_though_others_speak() {
    let currency = currency(10, &[1, 1]);
    let silence_max = Duration::from_secs(1);
    let wants_poll = |after| currency.wants_poll(silence_max, Instant::now() + after);
    let waiting = tokio::spawn({
        let currency = Arc::clone(&currency);
        async move { currency.wait(&name(), Partitions::All, at(9), soon(), None).await }
    });
    while currency.waiter_count() == 0 {
        tokio::task::yield_now().await;
    }
    announce(&currency, 0, 2, 2);
    assert!(wants_poll(Duration::ZERO), "the other has never spoken");
    announce(&currency, 1, 2, 2);
    assert!(!wants_poll(Duration::ZERO));
    assert!(wants_poll(Duration::from_secs(5)), "both are silent");
    waiting.abort();
}

#[tokio::test]
async fn a_caller_takes_no_more_places_than_it_may_and_gives_them_back() {
    let currency = currency(10, &[5, 5]);
    let wait = |caller: &'static str| {
        let waiting = Arc::clone(&currency);
        tokio::spawn(async move {
            waiting.wait(&name(), Partitions::All, at(7), soon(), Some(caller)).await
        })
    };
    let (ada, bob) = (wait("ada"), wait("bob"));
    while currency.waiter_count() < 2 {
        tokio::task::yield_now().await;
    }
    let refused = wait("ada").await.unwrap();
    assert_eq!((refused.err(), currency.waiter_count()), (Some(WaitRefused::CallerFull), 2));
    announce(&currency, 0, 9, 9);
    announce(&currency, 1, 9, 9);
    for waited in [ada, bob] {
        assert!(matches!(waited.await.unwrap(), Ok(Waited::Satisfied(Some(_)))));
    }
    assert!(currency.callers.lock().unwrap().is_empty(), "nobody is remembered for nothing");
}

#[tokio::test]
async fn who_waits_when_the_process_ends_is_told_so_and_nobody_begins_to_wait() {
    let currency = currency(10, &[5, 5]);
    let waiting = Arc::clone(&currency);
    let wait =
        tokio::spawn(
            async move { waiting.wait(&name(), Partitions::All, at(7), soon(), None).await },
        );
    while currency.waiter_count() == 0 {
        tokio::task::yield_now().await;
    }
    currency.drain();
    assert!(matches!(wait.await.unwrap(), Ok(Waited::TimedOut)));
    let late = currency.wait(&name(), Partitions::One(0), at(7), soon(), None).await;
    assert!(matches!(late, Ok(Waited::TimedOut)));
    assert_eq!(currency.waiter_count(), 0);
}

#[tokio::test(start_paused = true)]
async fn who_was_released_keeps_its_place_when_its_wait_is_over_but_not_for_ever() {
    let bounds = WaiterBounds { waiters_max: 10, per_caller_max: 10, released_max: 1 };
    let currency = Arc::new(Currency::new([name()], bounds));
    observe(&currency, 0, &[5, 5]);
    let turn = Instant::now() + Duration::from_secs(5);
    let wait = || {
        let (waiting, bounds) = (Arc::clone(&currency), WaitBounds { turn, ..within(50) });
        tokio::spawn(
            async move { waiting.wait(&name(), Partitions::One(0), at(7), bounds, None).await },
        )
    };
    let (first, second, third) = (wait(), wait(), wait());
    while currency.waiter_count() < 3 {
        tokio::task::yield_now().await;
    }
    announce(&currency, 0, 9, 9);
    let first = first.await.unwrap().unwrap();
    assert!(matches!(first, Waited::Satisfied(Some(_))));
    tokio::time::advance(Duration::from_secs(1)).await;
    for _ in 0..10 {
        tokio::task::yield_now().await;
    }
    assert!(!second.is_finished(), "its wait is over, and it stands in line");
    drop(first);
    let second = second.await.unwrap().unwrap();
    assert!(matches!(second, Waited::Satisfied(Some(_))));
    assert!(matches!(third.await.unwrap(), Ok(Waited::Satisfied(None))), "a turn that is kept");
}

/// It begins to listen after the snapshot was taken and before it counts.
#[test]
fn who_looks_before_a_snapshot_counts_is_told_of_it() {
    for _ in 0..100 {
        let currency = currency(10, &[5, 5]);
        let board = currency.boards[&name()].lock().unwrap();
        std::thread::scope(|scope| {
            let observing = scope.spawn(|| observe(&currency, 0, &[7, 7]));
            // It comes as far as the board mostly; wherever it is, what follows holds.
            (0..100).for_each(|_| std::thread::yield_now());
            let changes = currency.changes();
            assert_eq!(board.standing(Partitions::All).watermark, Some(at(5)));
            drop(board);
            observing.join().unwrap();
            assert!(changes.has_changed().unwrap());
        });
        assert_eq!(reached(&currency, Partitions::All), Some(at(7)));
    }
}
