//! How far a rebuild has come, for whoever waits for it.

use std::convert::Infallible;
use std::io::IsTerminal as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tokio::time::{Instant, MissedTickBehavior, interval};

/// On a terminal the bar is drawn this often.
const DRAW_INTERVAL: Duration = Duration::from_millis(200);
/// Elsewhere a line is printed this often.
const LINE_INTERVAL: Duration = Duration::from_secs(10);
/// How long a rate is measured over at least.
const RATE_WINDOW: Duration = Duration::from_secs(5);

/// What is being done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Events become states.
    Folding,
    /// States become rows.
    Filling,
    /// Tables get their keys and indexes.
    Indexing,
}

impl Phase {
    fn what(self) -> (&'static str, &'static str) {
        match self {
            Self::Folding => ("folding", "events"),
            Self::Filling => ("filling", "ranges of states"),
            Self::Indexing => ("indexing", "indexes"),
        }
    }
}

/// Cheap to clone, shared by all clones.
#[derive(Debug, Clone, Default)]
pub struct Progress {
    inner: Arc<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    stage: Mutex<Option<Stage>>,
    done: AtomicU64,
}

#[derive(Debug, Clone, Copy)]
struct Stage {
    phase: Phase,
    total: u64,
    began: Instant,
    began_with: u64,
}

impl Progress {
    /// Something begins of which so much is to be done, and so much is done already.
    pub fn begin(&self, phase: Phase, done: u64, total: u64) {
        let mut stage = self.inner.stage.lock().unwrap_or_else(PoisonError::into_inner);
        self.inner.done.store(done, Ordering::Relaxed);
        *stage = Some(Stage { phase, total, began: Instant::now(), began_with: done });
    }

    /// So much is done.
    pub fn set(&self, done: u64) {
        self.inner.done.store(done, Ordering::Relaxed);
    }

    /// So much more is done.
    pub fn add(&self, more: u64) {
        self.inner.done.fetch_add(more, Ordering::Relaxed);
    }

    /// Shows it until it is dropped: as a bar on a terminal, line by line elsewhere.
    pub async fn show(self, name: &str) -> Infallible {
        if std::io::stderr().is_terminal() { self.draw(name).await } else { self.print(name).await }
    }

    async fn draw(self, name: &str) -> Infallible {
        let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr());
        let template = "{prefix} {bar:30} {msg}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_prefix(name.to_owned());
        let mut ticks = interval(DRAW_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let Some((stage, done)) = self.now() else { continue };
            bar.set_length(stage.total);
            bar.set_position(done.min(stage.total));
            bar.set_message(said(stage, done));
        }
    }

    async fn print(self, name: &str) -> Infallible {
        let mut ticks = interval(LINE_INTERVAL);
        loop {
            ticks.tick().await;
            if let Some((stage, done)) = self.now() {
                eprintln!("{name}: {}", said(stage, done));
            }
        }
    }

    fn now(&self) -> Option<(Stage, u64)> {
        let stage = *self.inner.stage.lock().unwrap_or_else(PoisonError::into_inner);
        stage.map(|stage| (stage, self.inner.done.load(Ordering::Relaxed)))
    }
}

/// What `work` comes to, shown meanwhile.
pub async fn beside<T>(
    shown: impl Future<Output = Infallible>,
    work: impl Future<Output = T>,
) -> T {
    tokio::select! {
        biased;
        // There is nothing to be shown any more.
        done = work => done,
        never = shown => match never {},
    }
}

fn said(stage: Stage, done: u64) -> String {
    let (doing, things) = stage.phase.what();
    let elapsed = stage.began.elapsed();
    let rate = done.saturating_sub(stage.began_with) as f64 / elapsed.as_secs_f64().max(0.001);
    let mut text = format!("{doing} {done} of {} {things}", stage.total);
    if RATE_WINDOW <= elapsed && 0.0 < rate {
        let left = stage.total.saturating_sub(done) as f64 / rate;
        text += &format!(", {rate:.0}/s, {} left", clock(left as u64));
    }
    text
}

fn clock(seconds: u64) -> String {
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, seconds) => format!("{seconds}s"),
        (0, minutes, seconds) => format!("{minutes}m {seconds:02}s"),
        (hours, minutes, _) => format!("{hours}h {minutes:02}m"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_was_done_before_a_rebuild_was_killed_is_not_counted_into_its_rate() {
        let progress = Progress::default();
        progress.begin(Phase::Folding, 900, 1000);
        tokio::time::advance(Duration::from_secs(10)).await;
        progress.set(950);
        let (stage, done) = progress.now().unwrap();
        assert_eq!(said(stage, done), "folding 950 of 1000 events, 5/s, 10s left");
    }

    #[test]
    fn times_are_said_as_one_says_them() {
        assert_eq!([clock(7), clock(65), clock(3720)], ["7s", "1m 05s", "1h 02m"]);
    }
}
