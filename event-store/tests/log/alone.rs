//! A command that is appended alone takes a way of its own through the database, and comes to the same as on
//! the way of many.

use sqlx::{AssertSqlSafe, PgPool};
use uuid::Uuid;

use crate::support::{Database, LOG_ID, append, eventually, order};
use event_store::Expected;

/// The way of many, which is there for one command as well.
const TOGETHER: &str = "append_events_once(";
/// The way that is taken, up to what only it asks for.
const ALONE: &str = "append_events_once_guarded(1, 0, 1, ";

/// A command of one event.
struct One {
    log_id: Uuid,
    batch_id: Uuid,
    event_id: Uuid,
    aggregate: &'static str,
    /// Epoch and version, as SQL.
    expected: (&'static str, &'static str),
    data: &'static str,
}

/// What the function says: an answer, or the code of an error.
type Said = Result<(String, i32, i64, i64), String>;

impl One {
    async fn call(&self, pool: &PgPool, function: &str) -> Said {
        let Self { log_id, batch_id, event_id, aggregate, expected: (epoch, version), data } = self;
        let statement = format!(
            "select outcome, at_epoch, at_version, at_position from {function}
                 '{log_id}', '{batch_id}', array['order'], array['{aggregate}'],
                 array[{epoch}]::integer[], array[{version}]::bigint[], array[1],
                 array['{event_id}']::uuid[], array['order'], array['{aggregate}'],
                 array['OrderPlaced'], array[1]::smallint[], array['{event_id}']::uuid[],
                 array['{event_id}']::uuid[], array[null]::bytea[], array[null]::text[],
                 array['{data}'], '{{}}', '{{}}', '{{}}', '{{}}')"
        );
        let said = sqlx::query_as(AssertSqlSafe(statement)).fetch_one(pool).await;
        said.map_err(|error| error.as_database_error().unwrap().code().unwrap().into_owned())
    }
}

async fn log(pool: &PgPool) -> Vec<String> {
    let rows = "select (to_jsonb(event) - 'committed_at')::text from event order by position";
    let mut rows: Vec<String> = sqlx::query_scalar(rows).fetch_all(pool).await.unwrap();
    let head = "select to_jsonb(log_head)::text from log_head";
    rows.push(sqlx::query_scalar(head).fetch_one(pool).await.unwrap());
    rows
}

#[tokio::test]
async fn an_append_alone_comes_to_what_it_would_among_others() {
    let (alone, together) = (Database::start().await, Database::start().await);
    // Opening makes each the log.
    let _stores = (alone.store().await, together.store().await);
    let pools = [(alone.pool(), ALONE), (together.pool(), TOGETHER)];
    let id = |n: u128| Uuid::from_u128(n);
    let of = |n, aggregate, expected| One {
        log_id: LOG_ID.get(),
        batch_id: id(100 + n),
        event_id: id(n),
        aggregate,
        expected,
        data: "{}",
    };
    let (any, none) = (("null", "null"), ("null", "0"));
    let commands = [
        (of(1, "a", any), Ok("appended")),
        (of(2, "b", none), Ok("appended")),
        (of(3, "b", none), Ok("lost")),
        (of(4, "a", ("1", "1")), Ok("appended")),
        (of(5, "a", ("1", "1")), Ok("lost")),
        (of(6, "a", ("2", "2")), Ok("lost")),
        (of(7, "c", ("1", "1")), Ok("lost")),
        (of(8, "a", any), Ok("appended")),
        // An id that is taken, data that is no JSON, another log, a call that was given up.
        (of(8, "d", any), Err("23505")),
        (One { data: "{", ..of(9, "d", any) }, Err("22P02")),
        (One { log_id: id(7), ..of(10, "d", any) }, Err("TM002")),
        (One { batch_id: id(999), ..of(11, "d", any) }, Err("TM003")),
    ];
    for (pool, _) in &pools {
        let given_up = "insert into abandoned_append (batch_id) values ($1)";
        sqlx::query(given_up).bind(id(999)).execute(pool).await.unwrap();
    }
    for (nth, (command, outcome)) in commands.iter().enumerate() {
        let mut said = Vec::new();
        for (pool, function) in &pools {
            said.push(command.call(pool, function).await);
        }
        let came_to = said[0].as_ref().map(|said| said.0.as_str()).map_err(String::as_str);
        assert_eq!(came_to, *outcome, "{nth}");
        assert_eq!(said[0], said[1], "{nth}");
    }
    let mut refused = Vec::new();
    for (pool, function) in &pools {
        let refuse = "update log_head set refused_because = 'so'";
        sqlx::query(refuse).execute(pool).await.unwrap();
        refused.push(of(12, "d", any).call(pool, function).await);
    }
    assert_eq!(refused, [Err("TM001".to_owned()), Err("TM001".to_owned())]);
    assert_eq!(log(&pools[0].0).await, log(&pools[1].0).await);
}

#[tokio::test]
async fn the_log_is_read_along_its_keys_however_short_it_was_at_first() {
    let database = Database::start().await;
    let (store, committer) = database.store().await;
    let observer = database.pool();
    store.append(append(&order("o-0"), Expected::Any, 1)).await.unwrap();
    // A table of one row is quicker read through than looked up in, as long as it has one row.
    sqlx::query("vacuum analyze event").execute(&observer).await.unwrap();
    for nth in 1..40 {
        let appended = store.append(append(&order(&format!("o-{nth}")), Expected::Any, 1)).await;
        let before = consistency::Position::new(nth - 1).unwrap();
        assert_eq!(store.read_range(before, 1).await.unwrap().len(), 1, "{appended:?}");
    }
    committer.stop().await;
    drop(store);
    // Counted a moment after the connections that did it are gone.
    let scans = "select idx_scan, seq_scan from pg_stat_user_tables where relname = 'event'";
    let read_through = eventually("it is counted", async || {
        let scans: (i64, i64) = sqlx::query_as(scans).fetch_one(&observer).await.unwrap();
        (40 <= scans.0).then_some(scans.1)
    });
    assert!(read_through.await < 10);
}
