//! The wait of our own choice, against always waiting, always asking the primary, and a prophet who knows
//! how long each read would wait. Costs are milliseconds until the answer.
#![allow(clippy::unwrap_used, reason = "a failed step fails the test where it stands")]

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Duration;

use consistency::{Epoch, LogPosition, Pace, Position};
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

const TRIP_MS: f64 = 90.0;

/// What the same reads cost each of four ways to choose, in total.
#[derive(Debug, Default)]
struct Costs {
    adaptive: f64,
    always_wait: f64,
    always_forward: f64,
    prophet: f64,
}

/// Reads arrive at random, twenty a second; `lag(now, random)` says how long one that arrives now would
/// wait.
fn run(seconds: f64, seed: u64, lag: impl Fn(f64, &mut StdRng) -> f64) -> Costs {
    println!("seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let mut pace = Pace::default();
    let mut costs = Costs::default();
    // When a position is reached, in microseconds. Each read asks for one of its own, in a partition of
    // its own, so that one may overtake another.
    let mut pending = BinaryHeap::new();
    let (mut now_ms, mut asked) = (0.0, 0);
    while now_ms < seconds * 1000.0 {
        now_ms += -50.0 * f64::ln(1.0 - random.random::<f64>());
        while let Some(&Reverse((at_us, nth))) = pending.peek() {
            if now_ms * 1000.0 < at_us as f64 {
                break;
            }
            pending.pop();
            pace.reached(Duration::from_micros(at_us), Some(partition(nth)), at(nth));
        }
        let needs_ms = lag(now_ms, &mut random);
        asked += 1;
        let now = moment(now_ms);
        let waits_ms =
            f64::from(pace.worth_waiting_ms(now, Some(partition(asked)), 1, TRIP_MS as u32));
        pace.asked(now, Some(partition(asked)), at(asked));
        pending.push(Reverse((((now_ms + needs_ms) * 1000.0) as u64, asked)));
        costs.adaptive += if needs_ms <= waits_ms { needs_ms } else { waits_ms + TRIP_MS };
        costs.always_wait += needs_ms;
        costs.always_forward += TRIP_MS;
        costs.prophet += needs_ms.min(TRIP_MS);
    }
    costs
}

fn moment(ms: f64) -> Duration {
    Duration::from_secs_f64(ms / 1000.0)
}

fn partition(nth: u64) -> u16 {
    (nth % 65_536) as u16
}

fn at(nth: u64) -> LogPosition {
    LogPosition::new(Epoch::FIRST, Position::new(nth).unwrap())
}

fn exponential(mean: f64, random: &mut StdRng) -> f64 {
    -mean * f64::ln(1.0 - random.random::<f64>())
}

type Lag = fn(f64, &mut StdRng) -> f64;

#[test]
fn under_a_lag_that_stays_it_is_nearly_as_good_as_the_better_of_both() {
    let patterns: [(&str, Lag); 9] =
        [
            ("near", |_, _| 20.0),
            ("near, with jitter", |_, random| 10.0 + exponential(10.0, random)),
            ("commits every 100 ms", |_, random| random.random_range(0.0..100.0)),
            ("as far as the primary", |_, _| 90.0),
            ("exponential, as far as the primary", |_, random| exponential(90.0, random)),
            ("a little further than the primary", |_, random| 100.0 + exponential(10.0, random)),
            ("far", |_, _| 400.0),
            ("far, with jitter", |_, random| 200.0 + exponential(400.0, random)),
            ("mostly near, sometimes very far", |_, random| {
                if random.random_bool(0.9) { 10.0 } else { 2_000.0 }
            }),
        ];
    for (name, lag) in patterns {
        let costs = run(300.0, 11, lag);
        println!("{name}: {costs:?}");
        let better = costs.always_wait.min(costs.always_forward);
        assert!(costs.adaptive <= 1.1 * better, "{name}: {costs:?}");
    }
}

#[test]
fn under_a_lag_that_jumps_it_costs_at_most_twice_what_a_prophet_pays() {
    let patterns: [(&str, Lag); 6] = [
        ("every 5 s", |now, _| jumps(now, 5_000.0, 20.0, 2_000.0)),
        ("every 30 s", |now, _| jumps(now, 30_000.0, 20.0, 2_000.0)),
        ("every 30 s, to just above the trip", |now, _| jumps(now, 30_000.0, 80.0, 120.0)),
        ("every 60 s, by much", |now, _| jumps(now, 60_000.0, 10.0, 20_000.0)),
        ("a link cut for 10 s of every minute", |now, random| {
            let since = now % 60_000.0;
            let until_healed = if since < 10_000.0 { 10_000.0 - since } else { 0.0 };
            until_healed + 10.0 + exponential(10.0, random)
        }),
        ("a slow ramp", |now, _| 5.0 + (now % 60_000.0) / 200.0),
    ];
    for (name, lag) in patterns {
        let costs = run(300.0, 12, lag);
        println!("{name}: {costs:?}");
        assert!(costs.adaptive <= 2.0 * costs.prophet, "{name}: {costs:?}");
    }
}

#[test]
fn neither_of_the_simple_ways_is_good_everywhere() {
    // What makes the two tests above worth having.
    let near = run(60.0, 13, |_, _| 20.0);
    assert!(near.always_forward > 2.0 * near.prophet);
    let far = run(60.0, 13, |_, _| 400.0);
    assert!(far.always_wait > 2.0 * far.prophet);
}

fn jumps(now: f64, every: f64, low: f64, high: f64) -> f64 {
    if ((now / every) as u64).is_multiple_of(2) { low } else { high }
}
