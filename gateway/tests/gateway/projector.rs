//! A projector that applies, announces, parks and lies when it is told to, and never on its own.

use std::collections::{BTreeMap, HashMap};

use compose::{
    nats::{Server, User},
    postgres::Cluster,
};
use consistency::{
    AggregateId, Announcement, AnnouncementSeal, Epoch, Event, Name, Position, SEAL_HEADER,
};
use projection::{
    Changes, ProjectionDefinition, StoredState, ViewChanges,
    sql::{RowStatements, SearchStatements, ViewStatements},
};
use sqlx::{AssertSqlSafe, PgPool, Postgres, Transaction};

pub struct Projector {
    pub pool: PgPool,
    definition: ProjectionDefinition,
    products: ProjectionDefinition,
    region: &'static str,
    nats: async_nats::Client,
    states: HashMap<AggregateId, StoredState>,
    applied: Position,
}

impl Projector {
    /// Makes the tables in a database of the region's own; nothing is applied yet.
    pub async fn start(region: &'static str, cluster: &Cluster, nats: &Server) -> Self {
        let name = format!("tidemark_{}", region.replace('-', "_"));
        let url = cluster.create_database(&name).await.unwrap();
        Self::on(region, &url, nats).await
    }

    /// Makes the tables in a database that is there.
    pub async fn on(region: &'static str, url: &str, nats: &Server) -> Self {
        let pool = PgPool::connect(url).await.unwrap();
        sqlx::migrate!("../migrations/region").run(&pool).await.unwrap();
        let domain = orders::domain().unwrap();
        let definition = domain.projection("orders", 1).unwrap().clone();
        let products = domain.projection("products", 1).unwrap().clone();
        for known in domain.stored() {
            for statement in &known.statements().create {
                sqlx::query(AssertSqlSafe(statement.to_string())).execute(&pool).await.unwrap();
            }
            activate(&pool, known).await;
        }
        let (user, password) = nats.credentials(User::Operator);
        let options = async_nats::ConnectOptions::with_user_and_password(user, password);
        let options = match &nats.config().tls {
            Some(tls) => options.add_root_certificates(tls.ca.clone()),
            None => options,
        };
        let nats = options.connect(nats.url()).await.unwrap();
        let (states, applied) = (HashMap::new(), Position::ZERO);
        Self { pool, definition, products, region, nats, states, applied }
    }

    /// Commits the events up to `to`, and tells nobody.
    pub async fn apply(&mut self, log: &[Event], to: Position) {
        let mut transaction = self.pool.begin().await.unwrap();
        let new = log.iter().filter(|event| self.applied < event.at.position);
        let new: Vec<&Event> = new.filter(|event| event.at.position <= to).collect();
        for definition in [self.definition.clone(), self.products.clone()] {
            let changes = self.change(&definition, &new);
            write(&mut transaction, &definition, changes).await;
        }
        sqlx::query("update checkpoint set position = $1, committed_at = clock_timestamp()")
            .bind(to.as_i64())
            .execute(&mut *transaction)
            .await
            .unwrap();
        transaction.commit().await.unwrap();
        self.applied = to;
    }

    fn change(&mut self, definition: &ProjectionDefinition, new: &[&Event]) -> Changes {
        let mut batch: BTreeMap<&AggregateId, Vec<&Event>> = BTreeMap::new();
        for event in new.iter().filter(|event| definition.partition_of(&event.aggregate).is_some())
        {
            batch.entry(&event.aggregate).or_default().push(event);
        }
        let mut applied = Vec::new();
        for (aggregate, events) in batch {
            let before = self.states.get(aggregate).cloned().unwrap_or(StoredState::NOTHING);
            let document = definition.document().unwrap();
            let change = document.apply(aggregate, before, &events);
            assert!(change.stop.is_none(), "{:?}", change.stop);
            self.states.insert(aggregate.clone(), change.after.clone());
            applied.push(change);
        }
        Changes::gather(definition, applied)
    }

    /// Says that every partition stands at `to`, whether or not it does.
    pub async fn announce(&self, to: Position) {
        for partition in 0..self.definition.partition_count().get() {
            let said = Announcement {
                region: self.region.to_owned(),
                epoch: Epoch::FIRST,
                projection: Name::new("orders").unwrap(),
                version: 1,
                partition,
                from: Position::ZERO,
                to,
                stored: to,
                head: to,
                keys: None,
            };
            let subject = format!("tidemark.{}.currency", self.region);
            let payload = serde_json::to_vec(&[&said]).unwrap();
            let mut headers = async_nats::HeaderMap::new();
            let seal = AnnouncementSeal::new(crate::world::CREDENTIAL.as_bytes());
            headers.insert(SEAL_HEADER, seal.seal(&payload));
            self.nats.publish_with_headers(subject, headers, payload.into()).await.unwrap();
        }
        self.nats.flush().await.unwrap();
    }

    /// Puts every checkpoint and every row back to where `at` was, as a database that lost commits.
    pub async fn go_back_to_nothing(&mut self) {
        for table in self.definition.statements().tables() {
            let delete = format!("delete from \"{table}\"");
            sqlx::query(AssertSqlSafe(delete)).execute(&self.pool).await.unwrap();
        }
        sqlx::query("update checkpoint set position = 0").execute(&self.pool).await.unwrap();
        self.states.clear();
        self.applied = Position::ZERO;
    }

    /// Parks an order at a position.
    pub async fn park(&self, order_id: &str, at: Position) {
        sqlx::query(
            "insert into parked (projection, version, aggregate_type, aggregate_id, partition, epoch,
                                 position, reason)
             values ('orders', 1, 'order', $1, $2, 1, $3, 'decode')",
        )
        .bind(order_id)
        .bind(i32::from(self.definition.partition_count().partition_of(order_id)))
        .bind(at.as_i64())
        .execute(&self.pool)
        .await
        .unwrap();
    }
}

/// Registers a projection whose partitions have read nothing. The rollups stay without rows:
/// nobody asks for them here.
async fn activate(pool: &PgPool, definition: &ProjectionDefinition) {
    let count = i32::from(definition.partition_count().get());
    sqlx::query("insert into projection_version values ($1, 1, $2, true)")
        .bind(definition.name().as_str())
        .bind(count)
        .execute(pool)
        .await
        .unwrap();
    sqlx::query(
        "insert into checkpoint (projection, version, partition, epoch, position, event_id, fence)
         select $1, 1, n, 1, 0, gen_random_uuid(), 0 from generate_series(0, $2 - 1) as n",
    )
    .bind(definition.name().as_str())
    .bind(count)
    .execute(pool)
    .await
    .unwrap();
}

async fn write(
    transaction: &mut Transaction<'_, Postgres>,
    definition: &ProjectionDefinition,
    changes: Changes,
) {
    let statements = definition.statements();
    let states = changes.states;
    sqlx::query(AssertSqlSafe(statements.write_states.to_string()))
        .bind(states.aggregate_ids)
        .bind(states.partitions)
        .bind(states.previous_versions)
        .bind(states.versions)
        .bind(states.epochs)
        .bind(states.positions)
        .bind(states.created_positions)
        .bind(states.states)
        .execute(&mut **transaction)
        .await
        .unwrap();
    for (view, statements) in changes.views.into_iter().zip(&statements.views) {
        match (view, statements) {
            (
                ViewChanges::Row(rows),
                ViewStatements::Row(RowStatements { upsert, .. })
                | ViewStatements::Search(SearchStatements { upsert, .. }),
            ) => {
                sqlx::query(AssertSqlSafe(upsert.to_string()))
                    .bind(rows.aggregate_ids)
                    .bind(rows.versions)
                    .bind(rows.epochs)
                    .bind(rows.positions)
                    .bind(rows.data)
                    .execute(&mut **transaction)
                    .await
                    .unwrap();
            }
            (ViewChanges::List(items), ViewStatements::List(statements)) => {
                sqlx::query(AssertSqlSafe(statements.delete.to_string()))
                    .bind(items.deleted_keys)
                    .bind(items.deleted_created_positions)
                    .bind(items.deleted_ids)
                    .execute(&mut **transaction)
                    .await
                    .unwrap();
                sqlx::query(AssertSqlSafe(statements.upsert.to_string()))
                    .bind(items.list_keys)
                    .bind(items.created_positions)
                    .bind(items.aggregate_ids)
                    .bind(items.data)
                    .execute(&mut **transaction)
                    .await
                    .unwrap();
            }
            (view, _) => panic!("{view:?}"),
        }
    }
}
