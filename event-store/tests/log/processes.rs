//! Several processes on one log, killed, stopped and continued.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use compose::nats::User;
use compose::process::{Child, Signal};
use consistency::{Epoch, stream_name};
use tempfile::TempDir;
use uuid::Uuid;

use crate::region::{Region, polling};
use crate::support::{LOG_ID, assert_log_is_whole, eventually};
use crate::writer;

/// A process that appends and relays.
struct Writer {
    child: Child,
    log: PathBuf,
}

impl Writer {
    fn start(region: &Region, folder: &Path, name: &str) -> Self {
        let log = folder.join(name);
        let (user, password) = region.nats.credentials(User::Relay);
        let (log_id, nats_url) = (LOG_ID.get().to_string(), region.nats.url());
        let told = [&log_id, &region.database.url, &nats_url, &user, &password].map(String::as_str);
        let child = writer::program(name, &log, told).spawn().unwrap();
        Self { child, log }
    }

    /// Whole lines only: a killed process may leave half of one.
    fn lines(&self) -> Vec<String> {
        let text = std::fs::read_to_string(&self.log).unwrap();
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        whole.lines().map(str::to_owned).collect()
    }

    /// What it was told is in the log: position by key.
    fn acknowledged(&self) -> Vec<(Uuid, i64)> {
        let lines = self.lines();
        let appended = lines.iter().filter_map(|line| line.strip_prefix("appended "));
        appended
            .map(|line| {
                let (key, position) = line.split_once(' ').unwrap();
                (key.parse().unwrap(), position.parse().unwrap())
            })
            .collect()
    }

    fn relay_is(&self, state: &str) -> bool {
        let lines = self.lines();
        lines.iter().rev().find_map(|line| line.strip_prefix("relay ")) == Some(state)
    }

    /// Waits until it has had this many more appends acknowledged.
    async fn goes_on(&self, more: usize) {
        let wanted = self.acknowledged().len() + more;
        eventually("a writer goes on", async || {
            assert!(self.child.is_running(), "{}", self.child.log_tail());
            (self.acknowledged().len() >= wanted).then_some(())
        })
        .await;
    }
}

/// What was acknowledged is in the log once, where it was said to be; no key is there twice; the stream
/// is the log.
async fn assert_nothing_lost_or_doubled(region: &Region, acknowledged: Vec<(Uuid, i64)>) {
    let pool = region.database.pool();
    // What a killed process had begun may be committed still.
    eventually("nothing is under way", async || {
        let active: i64 = sqlx::query_scalar(
            "select count(*) from pg_stat_activity
             where datname = current_database() and pid <> pg_backend_pid() and state = 'active'",
        )
        .fetch_one(&pool)
        .await
        .unwrap();
        (active == 0).then_some(())
    })
    .await;
    assert_log_is_whole(&pool).await;
    let rows: Vec<(Uuid, i64)> = sqlx::query_as("select correlation_id, position from event")
        .fetch_all(&pool)
        .await
        .unwrap();
    let count = rows.len();
    let in_log: BTreeMap<Uuid, i64> = rows.into_iter().collect();
    assert_eq!(in_log.len(), count, "no key was appended twice");
    for (key, position) in acknowledged {
        assert_eq!(in_log.get(&key), Some(&position));
    }
    let running = region.relay_of(&region.store, polling()).await;
    assert_eq!(region.published().await.len(), count);
    running.stop().await;
}

#[tokio::test]
async fn three_processes_on_ten_aggregates_lose_and_double_nothing_when_killed_and_stopped() {
    let region = Region::start().await;
    let folder = TempDir::new().unwrap();
    let start = |name: &str| Writer::start(&region, folder.path(), name);
    let (steady, stopped) = (start("steady"), start("stopped"));
    let mut killed = start("killed 0");
    let mut acknowledged = Vec::new();
    for round in 1..=6 {
        killed.goes_on(10).await;
        stopped.goes_on(10).await;
        stopped.child.signal(Signal::STOP);
        killed.child.kill().await;
        acknowledged.extend(killed.acknowledged());
        // Neither holds the others up.
        steady.goes_on(30).await;
        killed = start(&format!("killed {round}"));
        killed.goes_on(10).await;
        stopped.child.signal(Signal::CONT);
    }
    for writer in [steady, stopped, killed] {
        writer.goes_on(1).await;
        writer.child.kill().await;
        acknowledged.extend(writer.acknowledged());
    }
    assert_nothing_lost_or_doubled(&region, acknowledged).await;
}

#[tokio::test]
async fn a_relay_stopped_beyond_its_lease_and_continued_does_no_harm() {
    let region = Region::start().await;
    let folder = TempDir::new().unwrap();
    let writers = ["one", "two"].map(|name| Writer::start(&region, folder.path(), name));
    let context = region.operate().await;
    let published = async || {
        let stream = context.get_stream(stream_name(Epoch::FIRST)).await.ok()?;
        Some(stream.cached_info().state.last_sequence)
    };
    for _ in 0..4 {
        let active = eventually("one of them relays", async || {
            writers.iter().position(|writer| writer.relay_is("active"))
        })
        .await;
        let (first, second) = (&writers[active], &writers[1 - active]);
        first.goes_on(5).await;
        first.child.signal(Signal::STOP);
        eventually("the other takes over", async || second.relay_is("active").then_some(())).await;
        let before = eventually("there is a stream", published).await;
        eventually("the other publishes", async || {
            published().await.filter(|last| *last > before + 20)
        })
        .await;
        first.child.signal(Signal::CONT);
        first.goes_on(5).await;
        eventually("the first stands by", async || first.relay_is("standby").then_some(())).await;
    }
    let mut acknowledged = Vec::new();
    for writer in writers {
        writer.child.kill().await;
        acknowledged.extend(writer.acknowledged());
    }
    assert_nothing_lost_or_doubled(&region, acknowledged).await;
}
