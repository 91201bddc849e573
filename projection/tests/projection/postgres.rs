//! The generated statements on a real server.

use std::path::Path;

use compose::postgres::Cluster;
use consistency::{AggregateId, LogPosition, PartitionCount, Version};
use projection::sql::{
    ListAnswer, ListStatements, NOT_AS_READ, RollupAnswer, RollupStatements, RowAnswer,
    RowStatements, ViewStatements,
};
use projection::{
    Applied, Changes, ProjectionDefinition, ProjectionKind, StateWrites, StoredState, ViewChanges,
};
use sqlx::migrate::Migrator;
use sqlx::postgres::PgPool;
use sqlx::{AssertSqlSafe, PgConnection};

use crate::notes::{at, epoch_at, event, note, note_count, notes, notes_of, position};

struct Database {
    pool: PgPool,
    _cluster: Cluster,
}

async fn database(definition: &ProjectionDefinition) -> Database {
    let cluster = Cluster::shared().await.unwrap();
    let url = cluster.create_database("tidemark_region").await.unwrap();
    let pool = PgPool::connect(&url).await.unwrap();
    let migrations = Path::new(env!("CARGO_MANIFEST_DIR")).join("../migrations/region");
    Migrator::new(migrations).await.unwrap().run(&pool).await.unwrap();
    // Twice, since a projector that starts again finds its tables.
    for statement in definition.statements().create.iter().chain(&definition.statements().create) {
        sqlx::query(AssertSqlSafe(statement.clone())).execute(&pool).await.unwrap();
    }
    Database { pool, _cluster: cluster }
}

async fn register(pool: &PgPool, definition: &ProjectionDefinition, active: bool) {
    sqlx::query("insert into projection_version (projection, version, partition_count, active) values ($1, $2, $3, $4)")
        .bind(definition.name().as_str())
        .bind(definition.version() as i32)
        .bind(i32::from(definition.partition_count().get()))
        .bind(active)
        .execute(pool)
        .await
        .unwrap();
}

async fn checkpoint(pool: &PgPool, definition: &ProjectionDefinition, partition: i32, at: i64) {
    sqlx::query("insert into checkpoint (projection, version, partition, epoch, position, event_id, fence) values ($1, $2, $3, 1, $4, gen_random_uuid(), 1)")
        .bind(definition.name().as_str())
        .bind(definition.version() as i32)
        .bind(partition)
        .bind(at)
        .execute(pool)
        .await
        .unwrap();
}

async fn park(pool: &PgPool, definition: &ProjectionDefinition, id: &str, at: i64) {
    sqlx::query("insert into parked (projection, version, aggregate_type, aggregate_id, partition, epoch, position, reason) values ($1, $2, 'note', $3, 0, 1, $4, 'fold')")
        .bind(definition.name().as_str())
        .bind(definition.version() as i32)
        .bind(id)
        .bind(at)
        .execute(pool)
        .await
        .unwrap();
}

async fn write_states(
    connection: &mut PgConnection,
    definition: &ProjectionDefinition,
    states: &StateWrites,
) -> i64 {
    sqlx::query_scalar(AssertSqlSafe(definition.statements().write_states.clone()))
        .bind(&states.aggregate_ids)
        .bind(&states.partitions)
        .bind(&states.previous_versions)
        .bind(&states.versions)
        .bind(&states.epochs)
        .bind(&states.positions)
        .bind(&states.created_positions)
        .bind(&states.states)
        .fetch_one(connection)
        .await
        .unwrap()
}

async fn write_views(
    connection: &mut PgConnection,
    definition: &ProjectionDefinition,
    changes: &Changes,
) {
    for (statements, view) in definition.statements().views.iter().zip(&changes.views) {
        match (statements, view) {
            (ViewStatements::Row(row), ViewChanges::Row(changes)) => {
                let delete = sqlx::query(AssertSqlSafe(row.delete.clone()));
                delete.bind(&changes.deleted_ids).execute(&mut *connection).await.unwrap();
                sqlx::query(AssertSqlSafe(row.upsert.clone()))
                    .bind(&changes.aggregate_ids)
                    .bind(&changes.versions)
                    .bind(&changes.epochs)
                    .bind(&changes.positions)
                    .bind(&changes.data)
                    .execute(&mut *connection)
                    .await
                    .unwrap();
            }
            (ViewStatements::List(list), ViewChanges::List(changes)) => {
                sqlx::query(AssertSqlSafe(list.delete.clone()))
                    .bind(&changes.deleted_keys)
                    .bind(&changes.deleted_created_positions)
                    .bind(&changes.deleted_ids)
                    .execute(&mut *connection)
                    .await
                    .unwrap();
                sqlx::query(AssertSqlSafe(list.upsert.clone()))
                    .bind(&changes.list_keys)
                    .bind(&changes.created_positions)
                    .bind(&changes.aggregate_ids)
                    .bind(&changes.data)
                    .execute(&mut *connection)
                    .await
                    .unwrap();
            }
            (_, _) => panic!("statements and changes are of different views"),
        }
    }
}

async fn load(pool: &PgPool, definition: &ProjectionDefinition, id: &str) -> StoredState {
    let rows: Vec<projection::sql::StateColumns> =
        sqlx::query_as(AssertSqlSafe(definition.statements().load_states.clone()))
            .bind(vec![id.to_owned()])
            .fetch_all(pool)
            .await
            .unwrap();
    let mut states = rows.into_iter().map(|row| StoredState::from_columns(row).unwrap());
    states.next().map_or(StoredState::NOTHING, |(found, state)| {
        assert_eq!(found, id);
        state
    })
}

/// Applies events of one aggregate as a projector would.
async fn apply(
    pool: &PgPool,
    definition: &ProjectionDefinition,
    aggregate: &AggregateId,
    events: &[(u64, u64, &str, &str)],
) {
    let before = load(pool, definition, aggregate.id()).await;
    let events: Vec<_> = events
        .iter()
        .map(|(version, position, kind, data)| event(aggregate, *version, *position, kind, data))
        .collect();
    let events: Vec<_> = events.iter().collect();
    let applied = definition.document().unwrap().apply(aggregate, before, &events);
    assert!(applied.stop.is_none(), "{:?}", applied.stop);
    let changes = Changes::gather(definition, vec![applied]);
    let mut transaction = pool.begin().await.unwrap();
    assert_eq!(write_states(&mut transaction, definition, &changes.states).await, 1);
    write_views(&mut transaction, definition, &changes).await;
    transaction.commit().await.unwrap();
}

fn row_statements(definition: &ProjectionDefinition) -> &RowStatements {
    let ViewStatements::Row(statements) = &definition.statements().views[0] else {
        panic!("the first view is a row view")
    };
    statements
}

fn list_statements(definition: &ProjectionDefinition) -> &ListStatements {
    let ViewStatements::List(statements) = &definition.statements().views[1] else {
        panic!("the second view is a list view")
    };
    statements
}

async fn read_row(pool: &PgPool, definition: &ProjectionDefinition, id: &str) -> RowAnswer {
    let columns = sqlx::query_as(AssertSqlSafe(row_statements(definition).read.clone()))
        .bind(i32::from(definition.partition_count().partition_of(id)))
        .bind(id)
        .fetch_one(pool)
        .await
        .unwrap();
    RowAnswer::from_columns(columns).unwrap()
}

async fn read_rows(
    pool: &PgPool,
    definition: &ProjectionDefinition,
    ids: &[&str],
) -> Vec<RowAnswer> {
    let partition = |id: &&str| i32::from(definition.partition_count().partition_of(id));
    let gathered = sqlx::query_as(AssertSqlSafe(row_statements(definition).read_many.clone()))
        .bind(ids.iter().map(partition).collect::<Vec<_>>())
        .bind(ids)
        .fetch_all(pool)
        .await
        .unwrap();
    let answers = gathered.into_iter().map(|columns| RowAnswer::from_gathered(columns).unwrap());
    let mut answers: Vec<_> = answers.collect();
    answers.sort_by_key(|(place, _)| *place);
    assert!(answers.iter().map(|(place, _)| *place).eq(0..ids.len()));
    answers.into_iter().map(|(_, answer)| answer).collect()
}

async fn read_list(
    pool: &PgPool,
    definition: &ProjectionDefinition,
    key: &str,
    after: (i64, &str),
    limit: i64,
) -> ListAnswer {
    let columns = sqlx::query_as(AssertSqlSafe(list_statements(definition).read.clone()))
        .bind(key)
        .bind(after.0)
        .bind(after.1)
        .bind(limit)
        .bind(2_i64)
        .fetch_one(pool)
        .await
        .unwrap();
    ListAnswer::from_columns(columns, definition.partition_count()).unwrap()
}

fn ids(answer: &ListAnswer) -> Vec<&str> {
    answer.items.iter().map(|item| item.key.as_str()).collect()
}

#[tokio::test]
async fn a_read_answers_before_there_is_a_version_a_checkpoint_or_a_row() {
    let definition = notes();
    let database = database(&definition).await;
    let row = read_row(&database.pool, &definition, "n-1").await;
    assert_eq!(row, RowAnswer { active_version: None, checkpoint: None, parked: None, row: None });
    let list = read_list(&database.pool, &definition, "ada", (0, ""), 10).await;
    assert_eq!(list.snapshot.active_version, None);
    assert_eq!(list.snapshot.checkpoints, vec![None, None]);
    assert_eq!(list.snapshot.smallest_checkpoint(), None);
    assert!(list.snapshot.parked_complete && list.items.is_empty());
}

#[tokio::test]
async fn one_statement_gives_row_checkpoint_parked_and_active_version() {
    let definition = notes();
    let Database { pool, _cluster } = &database(&definition).await;
    register(pool, &definition, true).await;
    let aggregate = note("n-1");
    apply(
        pool,
        &definition,
        &aggregate,
        &[(1, 3, "Written", r#"{"owner":"ada"}"#), (2, 5, "Pinned", "{}")],
    )
    .await;
    let partition = definition.partition_of(&aggregate).unwrap();
    checkpoint(pool, &definition, i32::from(partition), 7).await;
    park(pool, &definition, "n-1", 6).await;

    let answer = read_row(pool, &definition, "n-1").await;
    assert_eq!(answer.active_version, Some(1));
    assert_eq!(answer.checkpoint, Some(at(7)));
    assert_eq!(answer.parked, Some(position(6)));
    let row = answer.row.unwrap();
    assert_eq!((row.version, row.at), (Version::new(2).unwrap(), at(5)));
    assert_eq!(row.data, r#"{"owner":"ada","pinned":true}"#);

    park(pool, &definition, "n-absent", 2).await;
    let absent = read_row(pool, &definition, "n-absent").await;
    assert_eq!((&absent.row, absent.parked), (&None, Some(position(2))));

    let asked = ["n-absent", "n-1", "n-nobody", "n-1"];
    let gathered = read_rows(pool, &definition, &asked).await;
    for (id, gathered) in asked.iter().zip(gathered) {
        assert_eq!(gathered, read_row(pool, &definition, id).await, "{id} among many");
    }
}

#[tokio::test]
async fn a_missing_checkpoint_of_one_partition_shows_in_a_list() {
    let definition = notes();
    let Database { pool, _cluster } = &database(&definition).await;
    register(pool, &definition, true).await;
    checkpoint(pool, &definition, 1, 9).await;
    let snapshot = read_list(pool, &definition, "ada", (0, ""), 10).await.snapshot;
    assert_eq!(snapshot.checkpoints, vec![None, Some(at(9))]);
    assert_eq!(snapshot.smallest_checkpoint(), None);
    checkpoint(pool, &definition, 0, 4).await;
    let snapshot = read_list(pool, &definition, "ada", (0, ""), 10).await.snapshot;
    assert_eq!(snapshot.smallest_checkpoint(), Some(at(4)));
    assert_eq!(snapshot.largest_checkpoint(), Some(at(9)));
}

#[tokio::test]
async fn a_state_is_written_on_its_previous_version_only() {
    let definition = notes();
    let Database { pool, _cluster } = &database(&definition).await;
    let aggregate = note("n-1");
    let mut connection = pool.acquire().await.unwrap();
    let written = |before: StoredState, version, position| {
        let next = event(&aggregate, version, position, "Written", r#"{"owner":"ada"}"#);
        let applied: Applied = definition.document().unwrap().apply(&aggregate, before, &[&next]);
        Changes::gather(&definition, vec![applied]).states
    };
    let first = written(StoredState::NOTHING, 1, 3);
    assert_eq!(write_states(&mut connection, &definition, &first).await, 1);
    assert_eq!(write_states(&mut connection, &definition, &first).await, 0, "it is there already");

    let one = load(pool, &definition, "n-1").await;
    let second = written(one.clone(), 2, 5);
    assert_eq!(write_states(&mut connection, &definition, &second).await, 1);
    assert_eq!(write_states(&mut connection, &definition, &second).await, 0, "a duplicate");
    let two = load(pool, &definition, "n-1").await;
    assert_eq!((two.at(), two.created()), (at(5), position(3)));

    let gap = StateWrites { previous_versions: vec![3], versions: vec![4], ..second.clone() };
    assert_eq!(write_states(&mut connection, &definition, &gap).await, 0, "a gap");
    let nobody = StateWrites { aggregate_ids: vec!["n-2".into()], ..second };
    assert_eq!(write_states(&mut connection, &definition, &nobody).await, 0, "nothing precedes it");
    assert_eq!(load(pool, &definition, "n-1").await, two);
    assert_eq!(load(pool, &definition, "n-2").await, StoredState::NOTHING);
}

/// Where a checkpoint is demanded to be: epoch, position and fence.
type Place = (i32, i64, i64);

/// Applies in one statement as a projector would.
async fn apply_at_once(
    pool: &PgPool,
    definition: &ProjectionDefinition,
    (epoch, position, fence): Place,
    to: i64,
    changes: &Changes,
) -> Result<bool, sqlx::Error> {
    let ids = &changes.states.aggregate_ids;
    let partition = definition.partition_count().partition_of(&ids[0]);
    let all = sqlx::query_scalar(AssertSqlSafe(definition.statements().apply.clone()))
        .bind(i32::from(partition))
        .bind(epoch)
        .bind(position)
        .bind(fence)
        .bind(to)
        .bind(sqlx::types::Uuid::from_u128(to as u128))
        .bind(to * 1000)
        .bind(ids)
        .bind(ids)
        .bind(&changes.states.partitions)
        .bind(&changes.states.previous_versions)
        .bind(&changes.states.versions)
        .bind(&changes.states.epochs)
        .bind(&changes.states.positions)
        .bind(&changes.states.created_positions)
        .bind(&changes.states.states);
    let all = changes.views.iter().fold(all, |all, view| match view {
        ViewChanges::Row(row) => all
            .bind(&row.deleted_ids)
            .bind(&row.aggregate_ids)
            .bind(&row.versions)
            .bind(&row.epochs)
            .bind(&row.positions)
            .bind(&row.data),
        ViewChanges::List(list) => all
            .bind(&list.deleted_keys)
            .bind(&list.deleted_created_positions)
            .bind(&list.deleted_ids)
            .bind(&list.list_keys)
            .bind(&list.created_positions)
            .bind(&list.aggregate_ids)
            .bind(&list.data),
    });
    all.fetch_one(pool).await
}

#[tokio::test]
async fn a_batch_is_applied_in_one_statement_with_its_checkpoint_or_not_at_all() {
    let definition = notes();
    let Database { pool, _cluster } = &database(&definition).await;
    let one_by_one = database(&definition).await;
    let aggregate = note("n-1");
    let partition = i32::from(definition.partition_of(&aggregate).unwrap());
    register(pool, &definition, true).await;
    checkpoint(pool, &definition, partition, 7).await;
    let changes = async |version, position, kind, data| {
        let before = load(pool, &definition, "n-1").await;
        let next = event(&aggregate, version, position, kind, data);
        let applied = definition.document().unwrap().apply(&aggregate, before, &[&next]);
        Changes::gather(&definition, vec![applied])
    };
    let stored = async || -> (i64, i64, Option<i64>) {
        let checkpoint =
            "select position, fence, (extract(epoch from committed_at) * 1000000)::bigint
                          from checkpoint";
        sqlx::query_as(checkpoint).fetch_one(pool).await.unwrap()
    };

    let places: [Place; 3] = [(2, 7, 1), (1, 6, 1), (1, 7, 2)];
    let steps = [
        (1, 8, "Written", r#"{"owner":"ada"}"#),
        (2, 9, "Given", r#"{"owner":"bob"}"#),
        (3, 10, "Pinned", "{}"),
        (4, 12, "Torn", "{}"),
    ];
    for (version, to, kind, data) in steps {
        let (before, (at, ..)) = (shown(pool, &definition, "n-1").await, stored().await);
        let changes = changes(version, to as u64, kind, data).await;
        for (epoch, offset, fence) in places.map(|(epoch, at, fence)| (epoch, at - 7, fence)) {
            let elsewhere = (epoch, at + offset, fence);
            let done = apply_at_once(pool, &definition, elsewhere, to, &changes).await;
            assert!(!done.unwrap(), "{elsewhere:?}");
        }
        park(pool, &definition, "n-1", to).await;
        assert!(!apply_at_once(pool, &definition, (1, at, 1), to, &changes).await.unwrap());
        sqlx::query("delete from parked").execute(pool).await.unwrap();
        park(pool, &definition, "n-another", to).await;
        let mut gap = changes.clone();
        gap.states.previous_versions = vec![version as i64];
        let done = apply_at_once(pool, &definition, (1, at, 1), to, &gap).await;
        let code = done.unwrap_err().into_database_error().unwrap().code().unwrap().into_owned();
        assert_eq!(code, NOT_AS_READ);
        assert_eq!(shown(pool, &definition, "n-1").await, before, "nothing of it was done");
        assert_eq!(stored().await.0, at);

        assert!(apply_at_once(pool, &definition, (1, at, 1), to, &changes).await.unwrap());
        assert_eq!(stored().await, (to, 1, Some(to * 1000)));
        assert!(!apply_at_once(pool, &definition, (1, at, 1), to, &changes).await.unwrap());
        assert_eq!(stored().await, (to, 1, Some(to * 1000)));
        let one = [(version, to as u64, kind, data)];
        apply(&one_by_one.pool, &definition, &aggregate, &one).await;
        let expected = shown(&one_by_one.pool, &definition, "n-1").await;
        assert_eq!(shown(pool, &definition, "n-1").await, expected, "{kind}");
    }
}

/// The state, the row, and the items of some lists.
async fn shown(
    pool: &PgPool,
    definition: &ProjectionDefinition,
    id: &str,
) -> (StoredState, Option<(LogPosition, String)>, Vec<Vec<String>>) {
    let row = read_row(pool, definition, id).await.row.map(|row| (row.at, row.data));
    let mut lists = Vec::new();
    for (view, key) in [(1, "ada"), (1, "bob"), (2, "all")] {
        let ViewStatements::List(list) = &definition.statements().views[view] else {
            panic!("it is a list view")
        };
        let columns = sqlx::query_as(AssertSqlSafe(list.read.clone()));
        let columns = columns.bind(key).bind(0_i64).bind("").bind(9_i64).bind(9_i64);
        let columns = columns.fetch_one(pool).await.unwrap();
        let found = ListAnswer::from_columns(columns, definition.partition_count()).unwrap();
        lists.push(found.items.into_iter().map(|item| item.data).collect());
    }
    (load(pool, definition, id).await, row, lists)
}

/// It waited for a holder who came before: then it finds the checkpoint as that one left it.
#[tokio::test]
async fn a_batch_that_waited_for_the_next_holder_is_not_applied() {
    let definition = notes();
    let Database { pool, _cluster } = &database(&definition).await;
    let aggregate = note("n-1");
    register(pool, &definition, true).await;
    checkpoint(pool, &definition, i32::from(definition.partition_of(&aggregate).unwrap()), 7).await;
    let next = event(&aggregate, 1, 8, "Written", r#"{"owner":"ada"}"#);
    let document = definition.document().unwrap();
    let applied = document.apply(&aggregate, StoredState::NOTHING, &[&next]);
    let changes = Changes::gather(&definition, vec![applied]);
    let moves = [
        "update checkpoint set fence = fence + 1",
        "update checkpoint set position = position + 1",
        "update checkpoint set epoch = epoch + 1",
    ];
    for other in moves {
        let place = "select epoch, position, fence from checkpoint";
        let place: Place = sqlx::query_as(place).fetch_one(pool).await.unwrap();
        let mut holder = pool.begin().await.unwrap();
        sqlx::query(other).execute(&mut *holder).await.unwrap();
        let applying = apply_at_once(pool, &definition, place, 9, &changes);
        let released = async {
            let waits = "select exists (select from pg_stat_activity
                         where datname = current_database() and wait_event_type = 'Lock')";
            while !sqlx::query_scalar::<_, bool>(waits).fetch_one(pool).await.unwrap() {
                tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            }
            holder.commit().await.unwrap();
        };
        let (done, ()) = tokio::join!(applying, released);
        assert!(!done.unwrap(), "{other}");
        assert_eq!(load(pool, &definition, "n-1").await, StoredState::NOTHING);
        assert_eq!(read_row(pool, &definition, "n-1").await.row, None);
    }
}

#[tokio::test]
async fn items_move_between_lists_and_leave_with_their_aggregate() {
    let definition = notes();
    let Database { pool, _cluster } = &database(&definition).await;
    let aggregate = note("n-1");
    apply(pool, &definition, &aggregate, &[(1, 3, "Written", r#"{"owner":"ada"}"#)]).await;
    assert_eq!(ids(&read_list(pool, &definition, "ada", (0, ""), 10).await), ["n-1"]);

    apply(pool, &definition, &aggregate, &[(2, 5, "Given", r#"{"owner":"bob"}"#)]).await;
    assert!(read_list(pool, &definition, "ada", (0, ""), 10).await.items.is_empty());
    let moved = read_list(pool, &definition, "bob", (0, ""), 10).await.items.remove(0);
    assert_eq!(
        (moved.at, moved.created),
        (at(5), position(3)),
        "its place stays that of its birth"
    );

    // Nothing of the item changes, but its aggregate does.
    apply(pool, &definition, &aggregate, &[(3, 6, "Pinned", "{}")]).await;
    let pinned = read_list(pool, &definition, "bob", (0, ""), 10).await.items.remove(0);
    assert_eq!((pinned.version.get(), pinned.at), (3, at(6)));

    apply(pool, &definition, &aggregate, &[(4, 8, "Torn", "{}")]).await;
    assert!(read_list(pool, &definition, "bob", (0, ""), 10).await.items.is_empty());
    assert_eq!(read_row(pool, &definition, "n-1").await.row, None);
    let torn = load(pool, &definition, "n-1").await;
    assert_eq!((torn.version().get(), torn.state()), (4, None), "its events are still counted");
}

#[tokio::test]
async fn pages_follow_each_other_in_the_order_of_creation_and_id() {
    let definition = notes();
    let Database { pool, _cluster } = &database(&definition).await;
    for (id, position) in [("c", 4), ("a", 4), ("b", 9), ("d", 2)] {
        apply(pool, &definition, &note(id), &[(1, position, "Written", r#"{"owner":"ada"}"#)])
            .await;
    }
    apply(pool, &definition, &note("e"), &[(1, 5, "Written", r#"{"owner":"bob"}"#)]).await;
    let mut seen = Vec::new();
    let mut after = (0, String::new());
    loop {
        let page = read_list(pool, &definition, "ada", (after.0, &after.1), 2).await;
        let Some(last) = page.items.last() else { break };
        after = (last.created.as_i64(), last.key.clone());
        seen.extend(page.items.into_iter().map(|item| item.key));
    }
    assert_eq!(seen, ["d", "a", "c", "b"]);
}

#[tokio::test]
async fn more_parked_aggregates_than_the_bound_are_said_to_be_incomplete() {
    let definition = notes();
    let Database { pool, _cluster } = &database(&definition).await;
    register(pool, &definition, true).await;
    for (id, at) in [("n-9", 9), ("n-2", 2)] {
        park(pool, &definition, id, at).await;
    }
    let snapshot = read_list(pool, &definition, "ada", (0, ""), 10).await.snapshot;
    assert!(snapshot.parked_complete);
    let parked: Vec<_> = snapshot.parked.iter().map(|parked| parked.aggregate).collect();
    assert_eq!(parked, [note("n-2").key(), note("n-9").key()]);
    park(pool, &definition, "n-5", 5).await;
    let snapshot = read_list(pool, &definition, "ada", (0, ""), 10).await.snapshot;
    assert!(!snapshot.parked_complete);
}

#[tokio::test]
async fn another_version_shows_as_active_and_a_dropped_one_is_a_missing_table() {
    let (one, two) = (notes(), notes_of(2));
    let Database { pool, _cluster } = &database(&one).await;
    register(pool, &one, false).await;
    register(pool, &two, true).await;
    checkpoint(pool, &two, 0, 5).await;
    let answer = read_row(pool, &one, "n-1").await;
    assert_eq!((answer.active_version, answer.checkpoint), (Some(2), None));
    sqlx::query(AssertSqlSafe(one.statements().drop.clone())).execute(pool).await.unwrap();
    let error = sqlx::query(AssertSqlSafe(row_statements(&one).read.clone()))
        .bind(0)
        .bind("n-1")
        .fetch_one(pool)
        .await
        .unwrap_err();
    let code = error.as_database_error().and_then(|error| error.code().map(|c| c.into_owned()));
    assert_eq!(code.as_deref(), Some("42P01"));
}

#[tokio::test]
async fn parts_of_a_rollup_add_up_across_partitions_and_batches() {
    let definition = note_count();
    let Database { pool, _cluster } = &database(&definition).await;
    register(pool, &definition, true).await;
    let ProjectionKind::Rollup(rollup) = definition.kind() else { panic!("a rollup") };
    let ViewStatements::Rollup(RollupStatements { add, read }) = &definition.statements().views[0]
    else {
        panic!("the statements of a rollup")
    };
    let written = [
        (0, [("ada", 3, 10), ("bob", 4, 1), ("ada", 5, 7)].as_slice()),
        (1, &[("ada", 9, 30)]),
        (0, &[("ada", 6, 20)]),
    ];
    for (partition, batch) in written {
        let mut deltas = Vec::new();
        for (owner, position, length) in batch {
            let data = format!(r#"{{"owner":"{owner}","length":{length}}}"#);
            let event = event(&note("n-1"), 1, *position, "Written", &data);
            let counted = rollup.count(&StoredState::NOTHING, &[&event]);
            assert!(counted.error.is_none(), "{:?}", counted.error);
            deltas.extend(counted.deltas);
        }
        let gathered = deltas.iter().map(|(at, delta)| (*at, delta));
        let changes = rollup.gather(partition, gathered).unwrap();
        let mut query = sqlx::query(AssertSqlSafe(add.clone()))
            .bind(&changes.keys)
            .bind(&changes.partitions)
            .bind(&changes.epochs)
            .bind(&changes.positions);
        for column in &changes.columns {
            query = query.bind(column);
        }
        query.execute(pool).await.unwrap();
    }
    let answer = |key: &'static str| {
        let query = sqlx::query_as(AssertSqlSafe(read.clone())).bind(key).bind(2_i64);
        async move {
            let columns = query.fetch_one(pool).await.unwrap();
            RollupAnswer::from_columns(columns, PartitionCount::new(2).unwrap()).unwrap()
        }
    };
    let ada = answer("ada").await;
    assert_eq!(ada.snapshot.active_version, Some(1));
    let ada = ada.row.unwrap();
    assert_eq!(ada.values, [Some(4), Some(30), None]);
    assert_eq!(ada.at, at(9), "the newest event of any partition");
    assert_eq!(answer("bob").await.row.unwrap().values, [Some(1), Some(1), None]);
    assert_eq!(answer("eve").await.row, None);
}

#[tokio::test]
async fn a_position_of_a_newer_epoch_wins_whatever_its_number() {
    let definition = notes();
    let Database { pool, _cluster } = &database(&definition).await;
    let aggregate = note("n-1");
    apply(pool, &definition, &aggregate, &[(1, 9, "Written", r#"{"owner":"ada"}"#)]).await;
    let before = load(pool, &definition, "n-1").await;
    let mut next = event(&aggregate, 2, 4, "Pinned", "{}");
    next.at = epoch_at(2, 4);
    let applied = definition.document().unwrap().apply(&aggregate, before, &[&next]);
    let changes = Changes::gather(&definition, vec![applied]);
    let mut connection = pool.acquire().await.unwrap();
    assert_eq!(write_states(&mut connection, &definition, &changes.states).await, 1);
    write_views(&mut connection, &definition, &changes).await;
    let row: LogPosition = read_row(pool, &definition, "n-1").await.row.unwrap().at;
    assert_eq!(row, epoch_at(2, 4));
}

/// With a plan that is kept, as a server makes it for a statement that was run a few times.
#[tokio::test]
async fn a_page_looks_the_versions_of_its_items_up_however_few_there_were_when_it_was_planned() {
    let definition = notes();
    let Database { pool, _cluster } = &database(&definition).await;
    let mut connection = pool.acquire().await.unwrap();
    let state = definition.statements().tables().next().unwrap().to_owned();
    for statement in [
        "set plan_cache_mode = force_generic_plan; set enable_seqscan = off".to_owned(),
        format!(
            "insert into {state} (aggregate_id, partition, version, epoch, position, created_position)
             values ('n-1', 0, 1, 1, 1, 1)"
        ),
        format!("vacuum analyze {state}"),
    ] {
        sqlx::raw_sql(AssertSqlSafe(statement)).execute(&mut *connection).await.unwrap();
    }
    let ViewStatements::List(ListStatements { read, .. }) = &definition.statements().views[1]
    else {
        panic!("it is a list view")
    };
    let prepare = AssertSqlSafe(format!("prepare page as {read}"));
    sqlx::raw_sql(prepare).execute(&mut *connection).await.unwrap();
    let explain = "explain execute page('ada', 0, '', 10, 10)";
    let plan: Vec<String> = sqlx::query_scalar(explain).fetch_all(&mut *connection).await.unwrap();
    let found = plan.iter().position(|line| line.contains(&format!(" on {state} "))).unwrap();
    assert!(plan[found + 1].contains("Index Cond"), "{}", plan.join("\n"));
}
