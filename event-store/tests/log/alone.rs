//! Commands that need not be told apart take ways of their own through the database, two for a command by
//! itself and one for many, and come to the same as on the way of all others.

use consistency::{Name, SchemaVersion, Traceparent};
use event_store::{Append, Expected, NewEvent};
use futures::future::join_all;
use sqlx::postgres::PgRow;
use sqlx::{AssertSqlSafe, PgPool, Row};
use uuid::Uuid;

use crate::support::{
    Database, LOG_ID, append, assert_log_is_whole, eventually, hold_head, is_conflict, order,
    until_blocked, version,
};

/// A way of many commands through the database.
#[derive(Debug, Clone, Copy)]
enum Way {
    /// That of all, which is there for these as well.
    Together,
    /// That of their own.
    EachAlone,
    /// That of their own in a release before, which may run beside this one.
    Chained,
}

const WAYS: [Way; 3] = [Way::Together, Way::EachAlone, Way::Chained];

/// The statement of a command by itself, which says nothing when it does nothing.
const BY_ITSELF: &str = include_str!("../../src/alone.sql");

/// A command of one event.
struct One {
    log_id: Uuid,
    batch_id: Uuid,
    event_id: Uuid,
    aggregate: String,
    /// Epoch and version, as SQL.
    expected: (String, String),
    data: &'static str,
}

/// What the function says to each command, or the code of its error.
type Said = Result<Vec<(String, i32, i64, i64)>, String>;

/// Calls with commands of one batch.
async fn call(pool: &PgPool, way: Way, commands: &[One]) -> Said {
    let each =
        |of: &dyn Fn(&One) -> String| commands.iter().map(of).collect::<Vec<String>>().join(", ");
    let One { log_id, batch_id, .. } = &commands[0];
    let types = each(&|_| "'order'".to_owned());
    let aggregates = each(&|one| format!("'{}'", one.aggregate));
    let epochs = each(&|one| one.expected.0.clone());
    let versions = each(&|one| one.expected.1.clone());
    let ids = each(&|one| format!("'{}'", one.event_id));
    let ones = each(&|_| "1".to_owned());
    let data = each(&|one| format!("'{}'", one.data));
    let call = format!("'{log_id}', '{batch_id}'");
    let expected = format!(
        "array[{types}], array[{aggregates}], array[{epochs}]::integer[],
         array[{versions}]::bigint[]"
    );
    let ids = format!("array[{ids}]::uuid[]");
    let events = format!(
        "array[{types}], array[{ones}]::smallint[], {ids}, {ids}, '{{}}', '{{}}', array[{data}]"
    );
    let told_apart = format!(
        "{call}, {expected}, array[{ones}], {ids}, array[{types}], array[{aggregates}], {events},
         '{{}}', '{{}}', '{{}}', '{{}}'"
    );
    let row_for_each = "select outcome, at_epoch, at_version, at_position from";
    let statement = match way {
        Way::Together => {
            format!("{row_for_each} append_events_once({told_apart}) order by command_number")
        }
        Way::Chained => format!(
            "{row_for_each} append_events_chained(true, 1, 0, 1, {told_apart})
             order by command_number"
        ),
        Way::EachAlone => format!(
            "select
                 case when is_lost then 'lost' else 'appended' end,
                 coalesce(lost_epochs[n], head_epoch),
                 last_versions[n] + case when is_lost then 0 else 1 end,
                 coalesce(
                     lost_positions[n],
                     head_position + count(*) filter (where not is_lost) over (order by n))
             from append_events_each_alone(1, 0, 1, {call}, {expected}, {ids}, {events}) as said,
                 generate_series(1, cardinality(last_versions)) as n,
                 lateral (select lost_positions[n] is not null as is_lost) as of_it
             order by n"
        ),
    };
    let said = sqlx::query_as(AssertSqlSafe(statement)).fetch_all(pool).await;
    said.map_err(|error| error.as_database_error().unwrap().code().unwrap().into_owned())
}

/// Appends one command by itself: where it stands, if it was appended.
async fn by_itself(
    pool: &PgPool,
    judged: Option<i32>,
    one: &One,
) -> Result<Option<(i32, i64, i64)>, String> {
    let said = sqlx::query(BY_ITSELF)
        .bind(1)
        .bind(0_i64)
        .bind(judged)
        .bind(one.log_id)
        .bind(one.batch_id)
        .bind("order")
        .bind(&one.aggregate)
        .bind(one.expected.0.parse::<i32>().ok())
        .bind(one.expected.1.parse::<i64>().ok())
        .bind(one.event_id)
        .bind("order")
        .bind(1_i16)
        .bind(one.event_id)
        .bind(one.event_id)
        .bind(None::<&[u8]>)
        .bind(None::<&str>)
        .bind(one.data)
        .fetch_optional(pool)
        .await;
    let place = |row: PgRow| (row.get("epoch"), row.get("version"), row.get("position"));
    said.map(|row| row.map(place))
        .map_err(|error| error.as_database_error().unwrap().code().unwrap().into_owned())
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
    let databases = [Database::start().await, Database::start().await, Database::start().await];
    let itself = Database::start().await;
    // Opening makes each the log.
    let _stores = [
        databases[0].store().await,
        databases[1].store().await,
        databases[2].store().await,
        itself.store().await,
    ];
    let pools = [0, 1, 2].map(|nth| (databases[nth].pool(), WAYS[nth]));
    let itself = itself.pool();
    let id = |n: u128| Uuid::from_u128(n);
    let of = |n, aggregate: &str, (epoch, version): (&str, &str)| One {
        log_id: LOG_ID.get(),
        batch_id: id(100 + n),
        event_id: id(n),
        aggregate: aggregate.to_owned(),
        expected: (epoch.to_owned(), version.to_owned()),
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
    for pool in pools.iter().map(|(pool, _)| pool).chain([&itself]) {
        let given_up = "insert into abandoned_append (batch_id) values ($1)";
        sqlx::query(given_up).bind(id(999)).execute(pool).await.unwrap();
    }
    for (nth, (command, outcome)) in commands.iter().enumerate() {
        let mut said = Vec::new();
        for (pool, way) in &pools {
            said.push(call(pool, *way, std::slice::from_ref(command)).await);
        }
        let came_to = said[0].as_ref().map(|said| said[0].0.as_str()).map_err(String::as_str);
        assert_eq!(came_to, *outcome, "{nth}");
        assert_eq!([&said[1], &said[2]], [&said[0], &said[0]], "{nth}");
        let place = match said.remove(0) {
            Ok(said) => Ok(said.into_iter().find(|said| said.0 == "appended")),
            // These the function has words for.
            Err(code) if code.starts_with("TM") => Ok(None),
            Err(code) => Err(code),
        };
        let place = place.map(|said| said.map(|(_, epoch, version, at)| (epoch, version, at)));
        assert_eq!(by_itself(&itself, Some(1), command).await, place, "{nth}");
    }
    let refuse = "update log_head set refused_because = 'so'";
    for (pool, way) in &pools {
        sqlx::query(refuse).execute(pool).await.unwrap();
        let refused = call(pool, *way, &[of(12, "d", any)]).await;
        assert_eq!(refused, Err("TM001".to_owned()), "{way:?}");
    }
    sqlx::query(refuse).execute(&itself).await.unwrap();
    assert_eq!(by_itself(&itself, Some(1), &of(12, "d", any)).await, Ok(None));
    let log_of_all = log(&itself).await;
    for (pool, way) in &pools {
        assert_eq!(log(pool).await, log_of_all, "{way:?}");
    }
}

/// A statement sees the log as it was when it began, be it that it waited for the head since.
#[tokio::test]
async fn an_append_by_itself_does_nothing_if_the_head_moved_while_it_waited() {
    let database = Database::start().await;
    let (store, _committer) = database.store().await;
    let pool = database.pool();
    store.append(append(&order("a"), Expected::Any, 1)).await.unwrap();
    let one = |batch| One {
        log_id: LOG_ID.get(),
        batch_id: Uuid::from_u128(batch),
        event_id: Uuid::new_v4(),
        aggregate: "a".to_owned(),
        expected: ("null".to_owned(), "null".to_owned()),
        data: "{}",
    };
    let log_id = LOG_ID.get();
    let nil = Uuid::nil();
    let moves = [
        // This very call is given up, and any other.
        format!("select from settle_append('{log_id}', '{}', '{{}}')", Uuid::from_u128(0)),
        format!("select from settle_append('{log_id}', '{nil}', '{{}}')"),
        "update log_head set refused_because = 'so'".to_owned(),
        "update log_head set epoch = epoch + 1".to_owned(),
        format!("update log_head set event_id = '{nil}'"),
        "update log_head set position = position + 1".to_owned(),
    ];
    for (nth, moved) in (0..).zip(moves) {
        for is_kept in [true, false] {
            let mut head = pool.begin().await.unwrap();
            sqlx::query(AssertSqlSafe(moved.as_str())).execute(&mut *head).await.unwrap();
            let one = one(nth);
            let appending = by_itself(&pool, None, &one);
            let moving = async {
                until_blocked(&pool, 1).await;
                match is_kept {
                    true => head.commit().await.unwrap(),
                    false => head.rollback().await.unwrap(),
                }
            };
            let before = log(&pool).await.len();
            let (place, ()) = tokio::join!(appending, moving);
            let place = place.unwrap();
            assert_eq!(place.is_none(), is_kept, "{moved}: {place:?}");
            assert_eq!(log(&pool).await.len(), before + usize::from(!is_kept), "{moved}");
            // As it was before.
            let last = "update log_head set refused_because = null, epoch = 1,
                            (position, event_id) =
                                (select position, id from event order by position desc limit 1)";
            sqlx::query(last).execute(&pool).await.unwrap();
            sqlx::query("delete from abandoned_append").execute(&pool).await.unwrap();
        }
    }
    assert_log_is_whole(&pool).await;
}

#[tokio::test]
async fn many_that_are_each_alone_come_to_what_they_would_told_apart() {
    let databases = [Database::start().await, Database::start().await, Database::start().await];
    let _stores =
        [databases[0].store().await, databases[1].store().await, databases[2].store().await];
    let pools = [0, 1, 2].map(|nth| (databases[nth].pool(), WAYS[nth]));
    let mut random = Random(7);
    let mut outcomes = Vec::new();
    for nth in 1..=40 {
        let count = random.below(9) + 2;
        let drawn: Vec<u128> = (0..12).filter(|_| random.below(12) < count).collect();
        let commands: Vec<One> = drawn
            .into_iter()
            .map(|aggregate| One {
                log_id: LOG_ID.get(),
                batch_id: Uuid::from_u128(nth),
                event_id: Uuid::from_u128(nth * 100 + aggregate),
                aggregate: format!("o-{aggregate}"),
                // Of an aggregate that has a few events: any, none, the right number or another, the right
                // epoch or another.
                expected: match random.below(4) {
                    0 => ("null".to_owned(), "null".to_owned()),
                    1 => ("null".to_owned(), "0".to_owned()),
                    _ => ((random.below(6) / 5 + 1).to_string(), random.below(7).to_string()),
                },
                data: "{}",
            })
            .collect();
        if commands.is_empty() {
            continue;
        }
        let [(first, way), others @ ..] = &pools;
        let said = call(first, *way, &commands).await;
        for (pool, way) in others {
            assert_eq!(call(pool, *way, &commands).await, said, "{nth} {way:?}");
        }
        outcomes.extend(said.unwrap().into_iter().map(|said| said.0));
    }
    let log_of_all = log(&pools[0].0).await;
    for (pool, way) in &pools {
        assert_eq!(log(pool).await, log_of_all, "{way:?}");
    }
    for outcome in ["appended", "lost"] {
        assert!(20 < outcomes.iter().filter(|said| *said == outcome).count(), "{outcomes:?}");
    }
}

/// What each of them is made of is its own, also where one between them loses, and where some have what others
/// lack.
#[tokio::test]
async fn many_that_are_each_alone_stand_in_the_log_as_they_were_given() {
    let database = Database::start().await;
    let (store, _committer) = database.store().await;
    let pool = database.pool();
    store.append(append(&order("o-2"), Expected::Any, 1)).await.unwrap();
    let given = |nth: u16| {
        let mut given = append(&order(&format!("o-{nth}")), Expected::MustNotExist, 1);
        given.correlation_id = Uuid::new_v4();
        given.causation_id = Uuid::new_v4();
        given.events[0].event_type = Name::new(format!("Noted{nth}")).unwrap();
        given.events[0].schema_version = SchemaVersion::new(nth + 1).unwrap();
        given.events[0].data = format!("{{\"nth\": {nth}}}");
        let marked = nth.is_multiple_of(2);
        given.idempotency_key_hash = marked.then(|| [u8::try_from(nth).unwrap(); 32]);
        let parent = format!("00-0af7651916cd43dd8448eb211c80319c-b7ad6b716920333{nth}-01");
        given.traceparent = (!marked).then(|| Traceparent::parse(&parent).unwrap());
        given
    };
    let all: Vec<_> = (0..6).map(given).collect();
    let lock = hold_head(&pool).await;
    let plug = store.append(append(&order("plug"), Expected::Any, 1));
    let gathered = join_all(all.iter().map(|given| store.append(given.clone())));
    let release = async {
        until_blocked(&pool, 1).await;
        lock.rollback().await.unwrap();
    };
    let (plug, answers, ()) = tokio::join!(plug, gathered, release);
    let mut end = plug.unwrap().last_position().position;
    for (given, answer) in all.iter().zip(answers) {
        if given.aggregate == order("o-2") {
            assert!(is_conflict(&answer), "{answer:?}");
            continue;
        }
        let answer = answer.unwrap();
        let [event] = store.read_range(end, 1).await.unwrap().try_into().unwrap();
        end = end.next();
        assert_eq!((answer.first_position, answer.first_version), (end, version(1)));
        assert_eq!((event.at, event.version), (answer.last_position(), version(1)));
        assert_eq!(event.committed_at, answer.committed_at);
        let stored = Append {
            aggregate: event.aggregate,
            expected: given.expected,
            events: vec![NewEvent {
                id: event.id,
                event_type: event.event_type,
                schema_version: event.schema_version,
                data: event.data,
            }],
            correlation_id: event.correlation_id,
            causation_id: event.causation_id,
            idempotency_key_hash: event.idempotency_key_hash,
            traceparent: event.traceparent,
        };
        assert_eq!(stored, *given);
    }
    assert_eq!(assert_log_is_whole(&pool).await, 7);
}

/// Nobody can promise it falsely and be believed.
#[tokio::test]
async fn two_commands_on_an_aggregate_that_are_said_to_be_each_alone_append_nothing() {
    let database = Database::start().await;
    let _store = database.store().await;
    let of = |n| One {
        log_id: LOG_ID.get(),
        batch_id: Uuid::from_u128(1),
        event_id: Uuid::from_u128(n),
        aggregate: "a".to_owned(),
        expected: ("null".to_owned(), "null".to_owned()),
        data: "{}",
    };
    let pool = database.pool();
    let before = log(&pool).await;
    for way in [Way::EachAlone, Way::Chained] {
        assert_eq!(call(&pool, way, &[of(1), of(2)]).await, Err("23505".to_owned()), "{way:?}");
        assert_eq!(log(&pool).await, before);
    }
}

/// The same numbers in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) % bound
    }
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
