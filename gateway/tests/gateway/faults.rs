//! What writers are told while the log's database, its disk, its sessions, NATS or the way to the primary
//! fail: never that something was done which was not, and in the end what became of it.

use std::path::Path;
use std::process::Command;

use compose::{nats::User, ports, proxy::Proxies};
use reqwest::Method;
use serde_json::json;
use sqlx::{PgPool, Postgres, Transaction};
use tempfile::TempDir;

use crate::{
    world::{self, Gateway, Reply, World, eventually},
    writers::Writers,
};

const EVENTS: &str = "/v1/aggregates/note/n-1/events";
const LINK: &str = "http-eu-west";

fn log_database(world: &World) -> PgPool {
    PgPool::connect_lazy(&world.postgres.url("tidemark_log")).unwrap()
}

async fn hold_head(pool: &PgPool) -> Transaction<'static, Postgres> {
    let mut lock = pool.begin().await.unwrap();
    sqlx::query("select from log_head for update").execute(&mut *lock).await.unwrap();
    lock
}

/// Ends the sessions that append, be it in the middle of a commit. Answers how many there were.
async fn terminate_appends(pool: &PgPool, waiting_only: bool) -> usize {
    let terminated: Vec<bool> = sqlx::query_scalar(
        "select pg_terminate_backend(pid) from pg_stat_activity
         where datname = current_database() and query like '%append_events%'
             and state = 'active' and pid <> pg_backend_pid()
             and (wait_event_type = 'Lock' or not $1)",
    )
    .bind(waiting_only)
    .fetch_all(pool)
    .await
    .unwrap();
    terminated.len()
}

async fn readiness(gateway: &Gateway) -> (u16, String) {
    let answer = reqwest::get(format!("{}/readyz", gateway.admin)).await.unwrap();
    (answer.status().as_u16(), answer.text().await.unwrap())
}

async fn keyed(gateway: &Gateway, key: &str) -> Reply {
    let body = json!({"events": [{"type": "Noted", "data": {"key": key}}]});
    let request = gateway.request(Method::POST, EVENTS).header("idempotency-key", key);
    Reply::of(request.json(&body)).await
}

#[tokio::test]
async fn while_the_logs_database_is_down_writes_are_503_and_afterwards_they_go_on() {
    let mut world = World::alone("").await;
    let writers = Writers::start([&world.primary, &world.region]);
    for crash in [true, false] {
        writers.go_on(20).await;
        if crash {
            world.postgres.kill().await.unwrap();
        } else {
            world.postgres.stop().await.unwrap();
        }
        writers.are_refused(6).await;
        world.postgres.start_again().await.unwrap();
    }
    writers.go_on(20).await;
    assert!(0 < writers.refused_with("primary-unreachable"));
    writers.all_is_in_the_log_of(&world).await;
    world.primary.ready().await;
}

#[tokio::test]
async fn sessions_killed_in_the_middle_of_their_commit_lose_and_double_nothing() {
    let world = World::alone("").await;
    let pool = log_database(&world);
    let writers = Writers::start([&world.primary, &world.region]);
    for round in 0..30 {
        // In turns before the commit, for certain, and wherever it just is.
        if round % 3 == 0 {
            let head = hold_head(&pool).await;
            eventually("an append waits", async || 0 < terminate_appends(&pool, true).await).await;
            drop(head);
        } else {
            eventually("an append runs", async || 0 < terminate_appends(&pool, false).await).await;
        }
        writers.go_on(3).await;
    }
    writers.all_is_in_the_log_of(&world).await;
}

#[tokio::test]
async fn while_nats_is_down_writes_are_acknowledged_and_the_stream_has_them_later() {
    let mut world = World::start().await;
    let writers = Writers::start([&world.primary, &world.region]);
    writers.go_on(10).await;
    world.nats.stop().await.unwrap();
    eventually("the gateway is degraded", async || {
        let (status, report) = readiness(&world.primary).await;
        assert_eq!(status, 200, "{report}");
        report.contains("relay failing")
    })
    .await;
    writers.go_on(40).await;
    world.nats.start_again().await.unwrap();
    eventually("the gateway has no complaint", async || {
        !readiness(&world.primary).await.1.contains("relay failing")
    })
    .await;
    writers.all_is_in_the_log_of(&world).await;
    let events = world.log().await;
    let (user, password) = world.nats.credentials(User::Operator);
    let options = async_nats::ConnectOptions::with_user_and_password(user, password);
    let context = async_nats::jetstream::new(options.connect(world.nats.url()).await.unwrap());
    let stream = context.get_stream_no_info("EVENTS-1").await.unwrap();
    eventually("the backlog is published", async || {
        stream.get_info().await.unwrap().state.last_sequence == events.len() as u64
    })
    .await;
    for event in events {
        let published = stream.get_raw_message(event.at.position.get()).await.unwrap();
        assert_eq!(published.payload, event.data.as_bytes());
    }
}

/// The region's gateway with a proxy in its way to the primary.
async fn far_away(world: &World) -> (Proxies, Gateway) {
    let proxies = Proxies::start(0).await.unwrap();
    let listen = format!("127.0.0.1:{}", ports::free().unwrap());
    let primary = world.primary.base.trim_start_matches("http://");
    proxies.create(LINK, &listen, primary).await.unwrap();
    let config = world::region_config(&world.postgres, &world.nats, &format!("http://{listen}"));
    let gateway = Gateway::start(&config).await;
    gateway.ready().await;
    (proxies, gateway)
}

#[tokio::test]
async fn a_forwarded_write_that_is_lost_on_its_way_back_is_found_by_its_key() {
    let world = World::start().await;
    let (proxies, region) = far_away(&world).await;
    let pool = log_database(&world);
    let head = hold_head(&pool).await;
    let cut = async {
        eventually("the write waits at the primary", async || {
            let waiting: i64 = sqlx::query_scalar(
                "select count(*) from pg_stat_activity where datname = current_database()
                     and wait_event_type = 'Lock' and query like '%append_events%'",
            )
            .fetch_one(&pool)
            .await
            .unwrap();
            0 < waiting
        })
        .await;
        proxies.set_enabled(LINK, false).await.unwrap();
    };
    let (lost, ()) = tokio::join!(keyed(&region, "k"), cut);
    assert_eq!(lost.came_to(), (503, "outcome-unknown"), "{lost:?}");
    assert_eq!(lost.header("retry-after"), "1");
    head.rollback().await.unwrap();
    eventually("it was done all the same", async || world.log().await.len() == 1).await;

    let cut_off = keyed(&region, "k").await;
    assert_eq!(cut_off.came_to(), (503, "primary-unreachable"), "{cut_off:?}");
    proxies.set_enabled(LINK, true).await.unwrap();
    eventually("the way is found again", async || {
        let found = keyed(&region, "k").await;
        if found.status == 503 {
            return false;
        }
        assert_eq!((found.status, found.header("idempotency-replayed")), (201, "true"));
        assert_eq!(found.word(), "forwarded");
        true
    })
    .await;
    assert_eq!(world.log().await.len(), 1);
}

/// A file system that is small enough to be filled. Needs the right to mount one.
struct SmallDisk {
    folder: TempDir,
}

impl SmallDisk {
    /// `None` where this process may not mount, be it root.
    fn mount() -> Option<Self> {
        let folder = tempfile::Builder::new().prefix("tidemark-disk-").tempdir().unwrap();
        let options = "size=24m,mode=0777";
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", options, "tmpfs"])
            .arg(folder.path())
            .output()
            .unwrap();
        if mounted.status.success() {
            return Some(Self { folder });
        }
        let said = String::from_utf8_lossy(&mounted.stderr).into_owned();
        let denied = said.contains("permission denied") || said.contains("must be superuser");
        assert!(denied, "a file system could not be mounted: {said}");
        None
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    fn filler(&self) -> std::path::PathBuf {
        self.path().join("filler")
    }

    /// Takes all the room that is left.
    fn fill(&self) {
        let full = Command::new("dd")
            .args(["if=/dev/zero", "bs=4k", "status=none"])
            .arg(format!("of={}", self.filler().display()))
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&full.stderr).into_owned();
        assert!(said.contains("No space left on device"), "{said}");
    }

    fn free(&self) {
        std::fs::remove_file(self.filler()).unwrap();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily, since the server may have files open still.
        let _ = Command::new("umount").arg("--lazy").arg(self.folder.path()).status();
    }
}

/// Moves the log's tables to the small disk.
async fn move_log(world: &World, disk: &SmallDisk) {
    let space = disk.path().join("space");
    std::fs::create_dir(&space).unwrap();
    let owned = Command::new("chown").arg("postgres").arg(&space).status();
    assert!(owned.unwrap().success());
    let pool = log_database(world);
    let location = space.display();
    for statement in [
        format!("create tablespace small location '{location}'"),
        "alter table event set tablespace small".to_owned(),
        "alter table idempotency set tablespace small".to_owned(),
    ] {
        sqlx::query(sqlx::AssertSqlSafe(statement)).execute(&pool).await.unwrap();
    }
}

/// Whether the kernel grants this process CAP_SYS_ADMIN, capability 21.
fn may_mount() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap();
    u64::from_str_radix(effective.trim(), 16).unwrap() & (1 << 21) != 0
}

#[tokio::test]
async fn while_the_disk_is_full_writes_are_503_and_go_on_when_there_is_room() {
    let Some(disk) = SmallDisk::mount() else {
        assert!(!may_mount(), "a disk could not be mounted although this process may mount one");
        eprintln!("SKIPPED: this process may not mount a file system, so no disk can be filled");
        return;
    };
    // Before the disk, so that the server is gone when that is unmounted.
    let world = World::alone("").await;
    move_log(&world, &disk).await;
    let writers = Writers::start([&world.primary, &world.region]);
    for _ in 0..2 {
        writers.go_on(20).await;
        disk.fill();
        writers.are_refused(20).await;
        disk.free();
    }
    writers.go_on(20).await;
    writers.all_is_in_the_log_of(&world).await;
}
