//! An engine for each version that follows the log: begun when the version appears, ended when it is
//! dropped.

use std::collections::BTreeMap;
use std::sync::Arc;

use process::postgres::{self, AtHand, PostgresConfig};
use projection::{Domain, ProjectionDefinition};
use tokio::sync::watch;
use tokio::task::{JoinError, JoinSet};
use tokio_util::sync::CancellationToken;

use super::{SERVICE, Work};
use crate::checkpoint::VersionKey;
use crate::engine::{Engine, Shared};
use crate::health::chain_of;
use crate::reader::tail::TailReader;
use crate::sharing::rows::Snapshot;
use crate::start::{StartError, key_of};
use crate::versions::Version;

/// What those who apply want of their connections. Nobody waits for the disk: rows and the checkpoint that
/// vouches for them are lost together in a crash of the database, and are applied again. Every statement
/// finds its rows by their keys, also when it was planned while the tables were empty; to plan it again for
/// each batch takes longer than to run it.
const APPLYING: [(&str, &str); 6] = [
    ("synchronous_commit", "off"),
    ("plan_cache_mode", "force_generic_plan"),
    ("enable_seqscan", "off"),
    ("enable_hashjoin", "off"),
    ("enable_mergejoin", "off"),
    ("jit", "off"),
];

/// The engines of one epoch.
pub(super) struct Engines<'a> {
    work: &'a Work,
    shared: Shared,
    over: CancellationToken,
    tasks: JoinSet<()>,
    running: BTreeMap<(String, u32), Running>,
}

struct Running {
    key: VersionKey,
    over: CancellationToken,
}

impl<'a> Engines<'a> {
    /// None yet, but who reads the stream's end for them. They all end with `over`.
    pub(super) fn new(
        work: &'a Work,
        shared: Shared,
        tail_reader: TailReader,
        over: CancellationToken,
    ) -> Self {
        let mut tasks = JoinSet::new();
        tasks.spawn(tail_reader.run(over.clone()));
        Self { work, shared, over, tasks, running: BTreeMap::new() }
    }

    /// Follows what the database shows until everything is over, and all engines have ended.
    pub(super) async fn run(
        mut self,
        mut seen: watch::Receiver<Option<Arc<Snapshot>>>,
    ) -> Result<(), StartError> {
        let mut outcome = Ok(());
        loop {
            let over = self.over.clone();
            tokio::select! {
                biased;
                () = over.cancelled() => break,
                Some(ended) = self.tasks.join_next() => {
                    if let Err(error) = ended {
                        outcome = Err(error.into());
                        break;
                    }
                }
                changed = seen.changed() => {
                    // Without its keeper the process is ending.
                    let Ok(()) = changed else { break };
                    let versions = seen.borrow_and_update().as_deref().map(follow);
                    if let Err(error) = self.settle(&versions.unwrap_or_default()) {
                        outcome = Err(error);
                        break;
                    }
                }
            }
        }
        self.over.cancel();
        outcome.and(self.ended().await.map_err(StartError::from))
    }

    async fn ended(&mut self) -> Result<(), JoinError> {
        let mut outcome = Ok(());
        while let Some(ended) = self.tasks.join_next().await {
            outcome = outcome.and(ended);
        }
        outcome
    }

    fn settle(&mut self, versions: &[Version]) -> Result<(), StartError> {
        let is_there = |running: &Running| versions.iter().any(|known| known.key == running.key);
        let gone: Vec<_> = self.running.extract_if(.., |_, running| !is_there(running)).collect();
        for (_, running) in gone {
            tracing::info!(version = %running.key, "not followed any more");
            running.over.cancel();
        }
        for version in versions {
            let name = (version.key.projection.to_string(), version.key.version);
            if !self.running.contains_key(&name)
                && let Some(definition) = instance(version, &self.work.domain)
            {
                let over = self.begin(definition)?;
                self.running.insert(name, Running { key: version.key.clone(), over });
            }
        }
        Ok(())
    }

    fn begin(&mut self, definition: ProjectionDefinition) -> Result<CancellationToken, StartError> {
        let key = key_of(&definition);
        let shared = self.for_version(&definition)?;
        let over = self.over.child_token();
        let stop = over.clone();
        self.tasks.spawn(async move {
            let (connections, status, health) =
                (shared.connections.clone(), shared.status.clone(), shared.health.clone());
            Engine::new(definition, shared).run(stop).await;
            connections.close().await;
            // Of a version that is gone nothing is known, and nothing ails it.
            status.forget(&key);
            health.forget(&key.to_string());
        });
        Ok(over)
    }

    /// What the engine of one version works with.
    fn for_version(&self, definition: &ProjectionDefinition) -> Result<Shared, StartError> {
        let config = self.work.config.apply_to(definition.name().as_str());
        // A writer looks at what comes next while it commits, and checkpoints are looked at as well.
        let attempts_max = u32::try_from(2 * config.writers_max + 1).unwrap_or(u32::MAX - 1);
        // Dead letters are tried again meanwhile.
        let connections_max = attempts_max + 1;
        let database = PostgresConfig { connections_max, ..self.work.config.database.clone() };
        let pool = postgres::connect_with(&database, SERVICE, |it| it.options(APPLYING))?;
        let connections = AtHand::new(pool, attempts_max);
        Ok(Shared { connections, config, ..self.shared.clone() })
    }
}

/// The versions that are to be followed.
fn follow(snapshot: &Snapshot) -> Vec<Version> {
    let versions = snapshot.versions.iter();
    versions.filter(|version| version.state.follows_the_log()).cloned().collect()
}

/// What a binary can apply of the versions that are to be followed.
pub(super) fn instance(version: &Version, domain: &Domain) -> Option<ProjectionDefinition> {
    match version.definition_in(domain) {
        Ok(definition) => definition,
        Err(error) => {
            let error = chain_of(&error);
            tracing::error!(version = %version.key, error, "not followed: it has no tables");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use compose::postgres::Cluster;
    use projection::sql::Statements;
    use projection::{ProjectionDefinition, ViewKind};
    use sqlx::{AssertSqlSafe, Connection as _, Executor as _, PgConnection};

    use super::*;

    /// To a region's database, which ends with its server.
    async fn region() -> (PgConnection, Cluster) {
        let cluster = Cluster::shared().await.unwrap();
        let url = cluster.create_database("tidemark_region").await.unwrap();
        let mut connection = PgConnection::connect(&url).await.unwrap();
        sqlx::migrate!("../migrations/region").run(&mut connection).await.unwrap();
        (connection, cluster)
    }

    /// Makes the tables, with so many rows in those that rows are looked up in.
    async fn fill(connection: &mut PgConnection, definition: &ProjectionDefinition, rows: u32) {
        let statements = definition.statements();
        connection.execute(AssertSqlSafe(&*statements.drop)).await.unwrap();
        for create in &statements.create {
            connection.execute(AssertSqlSafe(&**create)).await.unwrap();
        }
        let kinds = definition.views().iter().map(|view| match view.kind() {
            ViewKind::Row | ViewKind::Search(_) => {
                Some(("aggregate_id, version, epoch, position, data", "n, 1, 1, 1, '{}'"))
            }
            ViewKind::List => {
                Some(("list_key, created_position, aggregate_id, data", "n, n, n, '{}'"))
            }
            ViewKind::Rollup => None,
        });
        let state = (
            "aggregate_id, partition, version, epoch, position, created_position",
            "n, 0, 1, 1, 1, 1",
        );
        for (table, kind) in statements.tables().zip(std::iter::once(Some(state)).chain(kinds)) {
            let Some((columns, values)) = kind else { continue };
            let insert = format!(
                r#"insert into "{table}" ({columns}) select {values} from generate_series(1, {rows}) as n"#
            );
            connection.execute(AssertSqlSafe(insert)).await.unwrap();
            let analyze = format!(r#"vacuum analyze "{table}""#);
            connection.execute(AssertSqlSafe(analyze)).await.unwrap();
        }
    }

    /// How a statement is run by a plan that is made now.
    async fn plan(connection: &mut PgConnection, statement: &str) -> Vec<String> {
        let parameters = (1..).take_while(|n| statement.contains(&format!("${n}::")));
        let nothing = vec!["null"; parameters.count()].join(", ");
        let prepare = format!("prepare batch as {statement}");
        connection.execute(AssertSqlSafe(prepare)).await.unwrap();
        let explain = AssertSqlSafe(format!("explain execute batch({nothing})"));
        let lines = sqlx::query_scalar(explain).fetch_all(&mut *connection).await.unwrap();
        connection.execute("deallocate batch").await.unwrap();
        lines
    }

    /// The plan is kept, and the tables may be a million times as large when it is used.
    #[tokio::test]
    async fn a_batch_finds_its_rows_by_their_keys_however_few_there_were_when_it_was_planned() {
        let (mut connection, _cluster) = region().await;
        for (name, value) in APPLYING {
            let set = AssertSqlSafe(format!("set {name} = {value}"));
            connection.execute(set).await.unwrap();
        }
        for definition in orders::domain().unwrap().stored() {
            for rows in [0, 1, 2, 5, 100] {
                fill(&mut connection, definition, rows).await;
                let Statements { apply, write, open, look, load_states, .. } =
                    definition.statements();
                for statement in [apply, write, open, look, load_states] {
                    let plan = plan(&mut connection, statement).await;
                    let text = plan.join("\n");
                    assert!(!text.contains("Seq Scan"), "{rows} rows:\n{text}");
                    let scans = plan.windows(2).filter(|lines| {
                        lines[0].contains("Index Scan") || lines[0].contains("Index Only Scan")
                    });
                    for scan in scans {
                        assert!(scan[1].contains("Index Cond"), "{rows} rows:\n{text}");
                    }
                }
            }
        }
    }

    /// Also what adds to the rows of a rollup, and whatever else a projection may have.
    #[tokio::test]
    async fn every_part_of_a_batch_depends_on_the_checkpoint_that_it_moves() {
        let (mut connection, _cluster) = region().await;
        for definition in orders::domain().unwrap().stored() {
            fill(&mut connection, definition, 1).await;
            let text = plan(&mut connection, &definition.statements().apply).await.join("\n");
            let parts: Vec<&str> = text.split("CTE part_").skip(1).collect();
            assert!(!parts.is_empty(), "{text}");
            assert!(text.contains("CTE given"), "{text}");
            for part in parts {
                let mut own = part.lines().skip(1).take_while(|line| line.starts_with("    "));
                assert!(own.any(|line| line.contains("CTE Scan on moved")), "{part}\nof\n{text}");
            }
        }
    }
}
