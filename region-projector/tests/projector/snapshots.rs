//! Views as files: out of one region, into another.

use std::path::{Path, PathBuf};

use consistency::Position;
use process::config::Period;
use projection::Domain;
use region_projector::log::LogClient;
use region_projector::snapshot::file::Snapshot;
use region_projector::snapshot::{self, Header, Import, Imported, SnapshotError};
use region_projector::switch::{self, GateConfig, To};
use region_projector::verify::Extent;
use sqlx::PgPool;
use uuid::Uuid;

use crate::tally::{domain_of, domain_of_versions};
use crate::world::{LOG_ID, STREAM, World, eventually, stop};

fn domain() -> Domain {
    domain_of_versions(&[(1, 4)])
}

impl World {
    fn file(&self) -> PathBuf {
        self.postgres.log().with_file_name(format!("{}.snapshot", Uuid::new_v4()))
    }

    async fn exported(&self, projection: &str) -> (PathBuf, Header) {
        let (domain, file) = (domain(), self.file());
        let definition = domain.projection(projection, 1).unwrap();
        let header = snapshot::export(&self.pool, definition, "us-east", &file).await.unwrap();
        (file, header)
    }

    async fn import(
        &self,
        file: &Path,
        domain: &Domain,
        log_id: Uuid,
        beside: bool,
    ) -> Result<Imported, SnapshotError> {
        let log = &LogClient::new(&self.config().primary_log).unwrap();
        Box::pin(Import { pool: &self.pool, domain, log_id, log, beside }.run(file)).await
    }

    /// Another region on the same log.
    async fn new_region(self) -> (PgPool, Self) {
        let database_url = self.postgres.create_database("tidemark_other").await.unwrap();
        let config = process::postgres::PostgresConfig::new(&database_url);
        let pool = process::postgres::connect(&config, "test").unwrap();
        let old = self.pool.clone();
        (old, Self { database_url, pool, ..self })
    }
}

#[tokio::test]
async fn a_new_region_goes_on_from_a_snapshot_though_the_stream_has_lost_its_first_half() {
    let (world, projector) = World::with_tallies().await;
    let (tallies, header) = world.exported("tallies").await;
    let (totals, _) = world.exported("totals").await;
    stop(projector).await;
    let last = world.add("t-8", 2).await;
    world.add("t-new", 3).await;
    // Neither the stream nor the log tells the beginning any more.
    let stream = world.jetstream.get_stream(STREAM).await.unwrap();
    stream.purge().sequence(last.get() / 2).await.unwrap();
    world.log.set_cut(true);
    let (_, region) = world.new_region().await;
    for (file, lines) in [(&tallies, 19), (&totals, 4)] {
        let imported = region.import(file, &domain(), LOG_ID, false).await.unwrap();
        assert!(imported.is_active && lines < imported.line_count, "{imported:?}");
        assert_eq!(imported.key.version, 1);
    }
    assert!(header.checkpoints.iter().all(|checkpoint| checkpoint.committed_at_us.is_some()));
    let projector = region.projector(domain()).await;
    region.all_positions(last.next()).await;
    assert_eq!(region.tally("t-8").await, Some((30, 2)));
    assert_eq!(region.tally("t-new").await, Some((3, 1)));
    region.log.set_cut(false);
    for projection in ["tallies", "totals"] {
        // What was parked and discarded has come along.
        let verified = region.verified(projection, Extent::Whole).await;
        assert!(verified.is_sound(), "{verified:?}");
        assert_eq!(verified.parity.compared_count, 21);
    }
    assert_eq!(region.count("select count(*) from dead_letter where version = 1").await, 2);
    stop(projector).await;
}

#[tokio::test]
async fn a_snapshot_that_is_cut_or_changed_anywhere_is_refused() {
    let (world, projector) = World::with_tallies().await;
    stop(projector).await;
    let (file, _) = world.exported("tallies").await;
    let whole = std::fs::read(&file).unwrap();
    let counts = Snapshot::open(&file).unwrap().line_counts().unwrap();
    assert_eq!(counts[..3], [20, 19, 19], "states, rows and items");
    let (_, region) = world.new_region().await;
    let spoilt = region.file();
    let refused = async |bytes: &[u8], what: &str| {
        std::fs::write(&spoilt, bytes).unwrap();
        let refused = region.import(&spoilt, &domain(), LOG_ID, false).await;
        match refused {
            Err(SnapshotError::Damaged(_) | SnapshotError::Foreign) => {}
            Err(SnapshotError::UnknownFormat(_)) if what.contains("flipped") => {}
            other => panic!("{what}: {other:?}"),
        }
    };
    for length in (0..whole.len()).step_by(whole.len() / 40).chain([whole.len() - 1]) {
        refused(&whole[..length], &format!("cut to {length}")).await;
    }
    for at in (0..whole.len()).step_by(whole.len() / 80).chain([18, 21, 22, 25, whole.len() - 1]) {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x10;
        refused(&bytes, &format!("flipped at {at}")).await;
    }
    let longer = [&whole[..], b"more"].concat();
    refused(&longer, "longer").await;
    // None of it has come as far as the database.
    let tables = "select count(*) from pg_class where relname = 'projection_version'";
    assert_eq!(region.count(tables).await, 0);
    region.import(&file, &domain(), LOG_ID, false).await.unwrap();
}

#[tokio::test]
async fn a_snapshot_that_does_not_fit_is_refused_and_changes_nothing() {
    let (world, projector) = World::with_tallies().await;
    stop(projector).await;
    let (file, _) = world.exported("tallies").await;
    let again = {
        let domain = domain();
        let definition = domain.projection("tallies", 1).unwrap();
        snapshot::export(&world.pool, definition, "us-east", &file).await
    };
    assert!(matches!(again, Err(SnapshotError::File { .. })), "nothing is written over: {again:?}");
    let exists = world.import(&file, &domain(), LOG_ID, false).await;
    assert!(matches!(exists, Err(SnapshotError::Exists(_))), "{exists:?}");
    sqlx::query("update checkpoint set epoch = 2 where projection = 'tallies' and partition = 1")
        .execute(&world.pool)
        .await
        .unwrap();
    let (newer, _) = world.exported("tallies").await;
    let mut format = std::fs::read(&file).unwrap();
    format[21] = 2;
    let unknown = world.file();
    std::fs::write(&unknown, format).unwrap();

    let (_, region) = world.new_region().await;
    let unknown = region.import(&unknown, &domain(), LOG_ID, false).await;
    assert!(matches!(unknown, Err(SnapshotError::UnknownFormat(2))), "{unknown:?}");
    let other = region.import(&file, &domain(), Uuid::from_u128(8), false).await;
    assert!(matches!(other, Err(SnapshotError::OtherLog { .. })), "{other:?}");
    let rules = region.import(&file, &domain_of(2), LOG_ID, false).await;
    assert!(matches!(rules, Err(SnapshotError::UnknownDefinition { .. })), "{rules:?}");
    let epoch = region.import(&newer, &domain(), LOG_ID, false).await;
    assert!(matches!(epoch, Err(SnapshotError::NewerEpoch { .. })), "{epoch:?}");
    assert_eq!(region.count("select count(*) from projection_version").await, 0);
    // The log has lost what is in the file.
    region.log.open_epoch(Position::new(5).unwrap());
    let past = region.import(&file, &domain(), LOG_ID, false).await;
    assert!(matches!(past, Err(SnapshotError::PastEpoch { .. })), "{past:?}");
    assert_eq!(region.count("select count(*) from projection_version").await, 0);
}

#[tokio::test]
async fn a_snapshot_is_taken_in_beside_what_is_read_and_takes_over() {
    let (world, projector) = World::with_tallies().await;
    let (file, _) = world.exported("tallies").await;
    let imported = world.import(&file, &domain(), LOG_ID, true).await.unwrap();
    assert_eq!((imported.key.version, imported.is_active), (2, false));
    let last = world.add("t-9", 1).await;
    eventually("the new version follows the log", async || {
        let lowest = "select coalesce(min(position), 0) from checkpoint
                      where projection = 'tallies' and version = 2";
        last.as_i64() <= world.count(lowest).await
    })
    .await;
    let gate = GateConfig {
        catch_up_max: Period::from_secs(10),
        statement_timeout: Period::from_secs(30),
        accept_differences: false,
    };
    let domain = domain();
    let switched = switch::switch(&world.pool, &domain, "tallies", To::Ready, &gate);
    assert_eq!(Box::pin(switched).await.unwrap().to.version, 2);
    stop(projector).await;
}

#[tokio::test]
async fn an_operator_exports_inspects_and_imports_from_the_command_line() {
    let world = World::start().await;
    let projector = world.projector(orders::domain().unwrap()).await;
    eventually("the tables are there", async || projector.readiness().is_ready()).await;
    let last = world.place(12).await;
    world.all_positions(last).await;
    stop(projector).await;
    let names: Vec<String> =
        orders::domain().unwrap().stored().map(|known| known.name().to_string()).collect();
    let mut files = Vec::new();
    for name in &names {
        let file = world.file().to_str().unwrap().to_owned();
        let told = world.told(&["snapshot", "export", name, &file]).await;
        assert!(told.starts_with(&format!("{name} v1 at positions")), "{told}");
        let told = world.told(&["snapshot", "inspect", &file]).await;
        assert!(told.contains("state") && told.contains(&LOG_ID.to_string()), "{told}");
        let inspected = world.told_json(&["snapshot", "inspect", &file]).await;
        assert_eq!(inspected["header"]["projection"], name.as_str());
        files.push(file);
    }
    let (_, region) = world.new_region().await;
    for file in &files {
        let told = region.told(&["snapshot", "import", file]).await;
        assert!(told.contains("gateways read it"), "{told}");
        let again = region.operate(&["snapshot", "import", file]).await;
        let said = String::from_utf8_lossy(&again.stderr).into_owned();
        assert!(!again.status.success() && said.contains("--beside"), "{said}");
    }
    let projector = region.projector(orders::domain().unwrap()).await;
    let last = region.place(3).await;
    region.all_positions(last).await;
    stop(projector).await;
    for name in &names {
        let told = region.told(&["verify", name, "--whole"]).await;
        assert!(told.contains("holds what the log says"), "{told}");
    }
}
